"""The probe: what it measures here, and what becomes of it when it fails."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import Any

import pytest
from helpers import run_cli, small

from effprof.plan import Plan
from effprof.trainer import probe as probes

# One of each kind: torch's own, refreshed, with indices, in turns, in backward, joint, full
# gradients now and then. That every method is recorded as declared, test_contract.py holds.
KINDS = ("full", "galore", "sltrain", "badam", "lomo", "loro", "golore")


@pytest.mark.parametrize(
    ("model", "method"), [*(("9m", name) for name in KINDS), ("60m", "lowrank")]
)
def test_probe_agrees_with_the_estimate(model: str, method: str) -> None:
    """Micro-batch 4 in a process of its own; benchmarks/probe_accuracy.py runs all at 60m."""
    code, out, _ = run_cli(
        *("probe", "--model", model, "--method", method, "--micro-batch", "4"),
        *("--seq-len", "64", "--device", "cpu", "--seconds", "0", "--json"),
    )
    assert code == 0
    document = json.loads(out)
    assert document["outcome"] == "ok"
    assert document["measured"]["updates"] >= 3
    errors = {(row["when"], row["bucket"]): row["error"] for row in document["comparison"]}
    assert abs(errors["peak", "peak_allocated"]) < 1e-3
    for bucket in ("weights", "optimizer", "buffers"):
        assert errors["resident", bucket] in (0, None)  # None: nothing of it, in neither
    times = document["measured"]["step_seconds"]
    assert times["median"] > 0
    assert times["n"] >= 3
    assert document["measured"]["rss_peak"] > document["measured"]["memory"]["peak_allocated"] / 2


def test_table(tiny: str) -> None:
    code, out, _ = run_cli(
        *("probe", "--model", tiny, "--method", "galore", "--micro-batch", "2", "--seq-len", "16"),
        *("--device", "cpu", "--seconds", "0"),
    )
    assert code == 0
    assert "measured" in out
    assert "tokens/s" in out
    assert max(map(len, out.splitlines())) <= 100


def test_out_of_memory_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child held to 6 GiB of addresses: exit 3, how far it got, and the estimate beside it."""
    original = subprocess.Popen

    def limited(command: list[str], **options: Any) -> Any:
        limit = 6 * 2**30
        return original(
            command,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
            **options,
        )

    monkeypatch.setattr(probes.subprocess, "Popen", limited)
    code, out, _ = run_cli(
        *("probe", "--model", "9m", "--micro-batch", "64", "--dtype", "fp32"),
        *("--device", "cpu", "--json"),
    )
    document = json.loads(out)
    assert (code, document["outcome"]) == (3, "oom")
    assert document["measured"]["reached"] == "update 1 (first)"
    assert document["estimated"]["memory"]["peak_allocated"] > 6 * 2**30


def test_a_probe_that_hangs_is_stopped(tiny: str) -> None:
    result = probes.probe(small(tiny, "full"), time_limit=0.5)
    assert result.outcome == "timeout"


def test_a_killed_probe_says_so(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = subprocess.Popen

    def dies(command: list[str], **options: Any) -> Any:
        return original([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], **options)

    monkeypatch.setattr(probes.subprocess, "Popen", dies)
    result = probes.probe(small(tiny, "full"))
    assert result.outcome == "killed"
    assert "SIGKILL" in result.detail


def test_a_periodic_update_is_due_for_every_half() -> None:
    """The probe measures the update each half's periodic event happens in."""
    plan = Plan(model="9m", method="galore", device="cpu", settings={"refresh": 7})
    assert plan.updates == (("first", 0), ("steady", 1), ("periodic", 7))
