"""What is here: driver, GPUs, versions, settings; what can run and what would have to be added."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from effprof import calibration, gpus
from effprof.files import home
from effprof.measure import nvml
from effprof.measure.nvml import Session
from effprof.measure.visible import visible

SCHEMA = "effprof.doctor/1"
_PACKAGES = (
    *("effprof", "torch", "transformers", "nvidia-ml-py", "typer", "rich", "pandas", "datasets"),
    *("tokenizers", "safetensors", "pyarrow", "matplotlib", "bitsandbytes"),
)
_SETTINGS = (
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
    *("CUBLAS_WORKSPACE_CONFIG", "OMP_NUM_THREADS", "EFFPROF_HOME", "HF_HOME", "HF_HUB_OFFLINE"),
)


def examine() -> dict[str, Any]:
    """The JSON document of ``effprof doctor``; nothing that is missing makes it fail."""
    packages = {name: _version(name) for name in _PACKAGES}
    driver = _driver() if packages["nvidia-ml-py"] else {"problem": "nvidia-ml-py is missing"}
    torch = _torch()
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": packages,
        "driver": {name: driver.get(name) for name in ("version", "cuda", "problem")},
        "gpus": driver.get("gpus", []),
        "visible": driver.get("visible", {"uuids": [], "note": ""}),
        "torch": torch,
        "host": _host(),
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
        "store": _store(),
    }
    found["can"] = _can(found)
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver() -> dict[str, Any]:
    with nvml.session() as session:
        if not isinstance(session, Session):
            return dataclasses.asdict(session)
        devices = session.devices()
        shown = visible(devices)
        rows = []
        for device in devices:
            reading = session.read(device.uuid)
            card = gpus.recognise(device.name, device.total)
            rows.append(
                dataclasses.asdict(device)
                | {
                    "used": reading.used,
                    "card": card.name if card else None,
                    "temperature": reading.temperature,
                    "throttles": reading.throttles,
                    "reasons": {**device.reasons, **reading.reasons},
                }
            )
        return {
            **dataclasses.asdict(session.driver()),
            "gpus": rows,
            "visible": {"uuids": [one.uuid for one in shown.devices], "note": shown.note},
        }


def _torch() -> dict[str, Any]:
    """What torch itself says; a build without CUDA sees no GPU whatever the driver lists."""
    try:
        import torch
    except Exception as problem:  # noqa: BLE001 - a broken installation raises nearly anything
        return {"problem": f"{type(problem).__name__}: {problem}"}
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "gpus": torch.cuda.device_count(),
        "threads": torch.get_num_threads(),
        "problem": None,
    }


def _host() -> dict[str, Any]:
    if importlib.util.find_spec("psutil") is None:
        return {"problem": "psutil is missing"}
    from effprof.measure import host

    return {
        "processor": calibration.this_cpu(),
        "memory": host.total(),
        "available": host.available(),
        "energy_counter": host.energy() is not None,
    }


def _store() -> dict[str, Any]:
    found: dict[str, Any] = {
        "home": str(home()),
        "path": str(home() / "measurements.sqlite"),
        "measurements": 0,
        "calibrated": {},
        "problem": None,
    }
    if not (home() / "measurements.sqlite").exists():
        return found
    try:
        from effprof.errors import EffprofError
        from effprof.measure import store
    except ImportError as problem:
        return found | {"problem": str(problem)}
    try:
        cards = [card for card in store.cards() if card]
        found["measurements"] = store.count()
    except EffprofError as problem:
        return found | {"problem": problem.message}
    known = {card: calibration.of(card) for card in cards}
    return found | {"calibrated": {card: str(one) for card, one in known.items() if one}}


def _can(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What can run here; where something cannot, why and the command that adds it."""
    torch, packages = found["torch"], found["packages"]
    missing_torch = "torch is missing" if torch.get("problem") else ""
    install = "pip install effprof"
    gpu, gpu_hint = "", ""
    if not missing_torch and not torch["gpus"]:
        if torch["cuda"] is None and torch["hip"] is None:
            gpu, gpu_hint = (
                "this torch is built without CUDA",
                "pip install --force-reinstall torch",
            )
            if not found["gpus"]:
                gpu_hint = "needs a GPU and its driver first"
        elif found["driver"]["problem"]:
            gpu, gpu_hint = found["driver"]["problem"], "install or load the NVIDIA driver"
        else:
            note = found["visible"]["note"] or "CUDA shows no GPU"
            gpu, gpu_hint = note, "unset CUDA_VISIBLE_DEVICES"
    eight = "" if packages["bitsandbytes"] else "bitsandbytes is missing"
    rows = (
        ("estimate", "", ""),
        ("trace", missing_torch, install),
        ("probe and train on the CPU", missing_torch, install),
        ("probe and train on a GPU", missing_torch or gpu, install if missing_torch else gpu_hint),
        ("--state-dtype 8bit for real", eight, "pip install 'effprof[8bit]'"),
    )
    return [
        {"what": what, "ok": not why, "why": why or None, "fix": fix if why else None}
        for what, why, fix in rows
    ]
