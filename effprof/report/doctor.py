"""What is here, for people, and to be pasted into an issue."""

from __future__ import annotations

import textwrap
from typing import Any

from effprof.report.terminal import console
from effprof.units import gib


def show_doctor(found: dict[str, Any]) -> None:
    """Plain lines: they paste."""
    out = console()

    def line(name: str, text: str, style: str = "") -> None:
        shown = textwrap.fill(
            text, out.width, initial_indent=f"{name:<10}", subsequent_indent=" " * 10,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
        out.print(shown, style=style, soft_wrap=True)

    packages = found["packages"]
    line("effprof", f"{packages['effprof']} · Python {found['python']} · {found['system']}")
    shown = ("torch", "transformers", "nvidia-ml-py", "bitsandbytes", "datasets", "typer", "pandas")
    line("packages", " · ".join(f"{name} {packages[name] or 'missing'}" for name in shown))
    driver, torch, host = found["driver"], found["torch"], found["host"]
    if driver["problem"]:
        line("driver", f"none usable: {driver['problem']}")
    else:
        line("driver", f"NVIDIA {driver['version']} · CUDA up to {driver['cuda']}")
    if torch.get("problem"):
        line("torch", torch["problem"], "red")
    else:
        built = f"CUDA {torch['cuda']}" if torch["cuda"] else torch["hip"] or "the CPU only"
        line("torch", f"built for {built} · sees {torch['gpus']} GPUs · {torch['threads']} threads")
    for gpu in found["gpus"]:
        _show_gpu(line, gpu, found["visible"]["uuids"])
    if found["visible"]["note"]:
        line("visible", found["visible"]["note"], "yellow")
    if "problem" not in host:
        energy = "with" if host["energy_counter"] else "no"
        line(
            "host",
            f"{host['processor']} cores · {gib(host['available'], 1)} of "
            f"{gib(host['memory'], 1)} free · {energy} energy counter (RAPL)",
        )
    for name, value in found["settings"].items():
        line("setting", f"{name}={value}")
    store = found["store"]
    kept = (
        "1 measurement" if store["measurements"] == 1 else f"{store['measurements']} measurements"
    )
    line("store", f"{kept} in {store['path']}")
    if store["problem"]:
        line("store", store["problem"], "red")
    for card, text in store["calibrated"].items():
        line("", f"{card}: {text}")
    for one in found["can"]:
        if one["ok"]:
            line("yes", one["what"], "green")
        else:
            line("no", f"{one['what']}: {one['why']} → {one['fix']}", "yellow")


def _show_gpu(line: Any, gpu: dict[str, Any], shown: list[str]) -> None:
    size = "memory unknown" if gpu["total"] is None else gib(gpu["total"], 1)
    used = "" if gpu["used"] is None else f", {gib(gpu['used'], 1)} used"
    facts = [
        f"{gpu['name']} ({size}{used})",
        f"as {gpu['card']}" if gpu["card"] else "not in the catalog",
        "in MIG mode" if gpu["mig"] else "",
        gpu["virtual"] or "",
        "" if gpu["uuid"] in shown or gpu["mig"] else "not visible to CUDA",
    ]
    name = f"gpu {gpu['index']}" if gpu["parent"] is None else "  MIG"
    line(name, " · ".join(fact for fact in facts if fact))
    line("", gpu["uuid"], "dim")
    for what, why in gpu["reasons"].items():
        line("", f"no {what}: {why}", "dim")
