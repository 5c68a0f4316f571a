"""effprof validate: files of plans, tolerances, what is named; and the script for GPU owners."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import run_cli, small

from effprof.errors import EffprofError, UsageError
from effprof.plan import Plan
from effprof.prober.compare import compare
from effprof.prober.records import Probe, replay
from effprof.prober.run import Habits
from effprof.prober.validate import plans_of, validate

ROOT = Path(__file__).parent.parent
RECORDING = ROOT / "tests" / "data" / "probe_9m_galore_cpu.jsonl"

FILES = {
    "one.json": '{"model": "9m", "method": "full"}',
    "list.json": '[{"model": "9m"}, {"model": "60m", "method": "galore"}]',
    "lines.jsonl": '{"model": "9m"}\n\n{"plan": {"model": "60m", "device": "cuda"}}\n',
    "one.toml": '[plan]\nmodel = "9m"\n',
    "many.toml": '[[plan]]\nmodel = "9m"\n[[plan]]\nmodel = "60m"\n',
    "bare.toml": 'model = "9m"\n',
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_plans(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(FILES[name])
    found = plans_of(tmp_path / name, lambda: "cpu")
    assert [plan.model for plan in found] == ["9m", "60m"][: len(found)]
    assert len(found) == (2 if "60m" in FILES[name] else 1)
    assert found[0].device == "cpu"
    if name == "lines.jsonl":
        assert found[1].device == "cuda"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "file of plans"),
        ("[]", "no plan"),
        ("[1]", "no plan"),
        ('[{"model": "9m"}, {"model": "9mm"}]', "Plan 2"),
        ('{"model": "9m", "rnak": 3}', "rnak"),
        ("{", "file of plans"),
    ],
)
def test_bad_files(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        plans_of(path, lambda: "cpu")


def test_a_plan_that_cannot_run_leaves_the_others(tiny: str) -> None:
    plans = [small(tiny, "full"), small(tiny, "galore"), small(tiny, "lora")]

    def run(plan: Plan, habits: Habits) -> Probe:
        if plan.method == "galore":
            raise EffprofError("It cannot.", "Leave it.")
        return Probe(plan, "ok", "", {"memory": {"peak_allocated": 1}, "rss_peak": 1}, {})

    found = validate(plans, Habits(), run=run)
    assert [one.probe.outcome for one in found.results] == ["ok", "failed", "ok"]
    assert "It cannot" in found.results[1].probe.detail
    assert not found.passed


def test_verdicts() -> None:
    good = replay(RECORDING)
    need = good.measured["rss_peak"]

    def verdict(available: int, outcome: str = "ok") -> str:
        device = {**good.device, "available": available}
        return compare(Probe(good.plan, outcome, "", good.measured, device)).verdict

    assert verdict(need * 2) == "FITS"
    assert verdict(int(need * 1.02)) == "TIGHT"
    assert verdict(need - 1) == "DOES NOT FIT"
    assert verdict(need * 2, "oom") == "OOM"
    assert verdict(need * 2, "crashed") == "UNKNOWN"


def test_validate_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFPROF_HOME", str(tmp_path))
    path = tmp_path / "plans.jsonl"
    plan = {"model": "9m", "micro_batch": 2, "seq_len": 64, "device": "cpu"}
    rows = [{**plan, "method": name} for name in ("full", "sltrain")]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    code, out, err = run_cli(
        *("validate", "--plans", path, "--seconds", "0", "--tolerance", "0.001", "--tape")
    )
    assert code == 0, out
    assert "2 of 2 within 0.1 %" in out
    assert "[1/2, about" in err
    assert max(map(len, out.splitlines())) <= 100
    assert len(json.loads(run_cli("probe", "--list", "--json")[1])) == 2


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("--tolerance", "0"), "0.05"),
        (("--plans", "nowhere.json"), "file of plans"),
        (("--model", "9m", "--gpu", "t4"), "--gpu"),
        (("--replay", "x", "--model", "9m"), "--model"),
        ((), "--model 60m"),
    ],
)
def test_usage(arguments: tuple[str, ...], hint: str) -> None:
    code, out, err = run_cli("validate", *arguments)
    assert (code, out) == (2, "")
    assert hint in err


def test_out_of_tolerance_is_exit_3_and_names_the_worst() -> None:
    code, out, _ = run_cli("validate", "--replay", RECORDING, "--tolerance", "1e-12", "--tape")
    assert code == 3
    assert "peak allocated is estimated" in out


def test_the_script_for_gpu_owners_rehearsed_here(tmp_path: Path) -> None:
    """On the CPU, with a home and a tiny model of its own: one JSON file, every method in it."""
    config = tmp_path / "config.json"
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "vocab_size": 64, "max_position_embeddings": 512}
    config.write_text(json.dumps({"model_type": "llama", **shape, **heads}))
    from effprof import registry

    two = ",".join(registry.names()[:2])
    environment = {
        **os.environ,
        "DEVICE": "cpu",
        "SECONDS_EACH": "0",
        "METHODS": two,
        "EFFPROF": str(Path(sys.executable).parent / "effprof"),
        "EFFPROF_HOME": str(tmp_path),
    }
    out = tmp_path / "check.json"
    done = subprocess.run(
        [str(ROOT / "scripts" / "gpu_check.sh"), str(out), str(config)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    found = json.loads(out.read_text())
    assert found["tests"]["result"] == "skipped"
    assert found["doctor"]["schema"] == "effprof.doctor/1"
    assert len(found["validation"]["results"]) == 2, done.stderr
    assert "Send this file back" in done.stdout
