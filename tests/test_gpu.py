"""On a real GPU: `pytest -m gpu`, or scripts/gpu_check.sh. Never run where there is none."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import run_cli

from effprof import registry
from effprof.plan import Plan
from effprof.prober.compare import compare
from effprof.prober.run import Habits, probe

pytestmark = pytest.mark.gpu
HABITS = Habits(seconds=1.0)


def test_there_is_a_gpu() -> None:
    assert torch.cuda.is_available()
    found = json.loads(run_cli("doctor", "--json")[1])
    assert found["torch"]["gpus"] >= 1
    assert found["visible"]["uuids"] or found["driver"]["problem"]


@pytest.mark.parametrize("method", registry.names())
def test_allocated_memory_is_as_estimated(method: str) -> None:
    found = compare(probe(Plan(model="60m", method=method, micro_batch=4), HABITS))
    assert found.probe.outcome == "ok", found.probe.detail
    errors = {one.name: one.error for one in found.at_peak}
    assert abs(errors["peak_allocated"] or 0) < 0.01
    assert abs(errors["peak_reserved"] or 0) < 0.05


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "amp-bf16"},
        {"checkpointing": "full"},
        {"loss": "chunked"},
        {"attention": "math"},
        {"attention": "eager"},
        {"optimizer_impl": "foreach"},
        {"allocator": "expandable"},
        {"grad_accum": 2},
    ],
    ids=str,
)
def test_what_else_a_plan_can_say(changes: dict[str, object]) -> None:
    plan = Plan(model="60m", micro_batch=4, **changes)  # type: ignore[arg-type]
    found = compare(probe(plan, HABITS))
    assert found.probe.outcome == "ok", found.probe.detail
    errors = {one.name: one.error for one in found.at_peak}
    assert abs(errors["peak_allocated"] or 0) < 0.01


def test_the_recorded_tape_is_the_counters() -> None:
    """The allocator's history, replayed by our allocator, peaks where torch's counter does."""
    measured = probe(Plan(model="60m", method="galore", micro_batch=4), HABITS).measured
    memory = measured["memory"]
    assert abs(memory["recorded"] / memory["peak_allocated"] - 1) < 1e-3


def test_nvml_sees_the_process() -> None:
    memory = probe(Plan(model="60m", micro_batch=4), HABITS).measured["memory"]
    if memory["process_total"] is None:
        pytest.skip("this driver tells no process apart")
    assert memory["process_total"] >= memory["peak_reserved"]
    assert 50 * 2**20 < memory["context"] < 4 * 2**30


def test_out_of_memory_is_a_result() -> None:
    found = probe(Plan(model="7b", micro_batch=4096, seq_len=2048), HABITS)
    assert found.outcome == "oom"
