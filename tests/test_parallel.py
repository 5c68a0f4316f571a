"""Two processes over gloo against one, and their recorded tapes against estimates."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from effprof import registry
from effprof import tape as tapes
from effprof.errors import UsageError
from effprof.estimator.memory import memory
from effprof.plan import Plan, from_dict
from effprof.shards import held, owners, rounds
from effprof.step import work_out
from effprof.tape import Tape

# Short periods, so that a few updates have every event a method knows; none at all for a method
# that has no such setting.
_SHORT = {
    "refresh": 2,
    "restart_every": 2,
    "exact_every": 2,
    "switch_every": 2,
    "reset_every": 2,
    "skip": 0,
}
_REST = {"micro_batch": 2, "seq_len": 32, "dtype": "fp32", "device": "cpu"}


def _plan(model: str, method: str, **changes: Any) -> Plan | None:
    """A plan with short periods; None where it is refused under FSDP."""
    chosen = registry.method(method)
    fields = registry.setting_fields(chosen.addressed)
    short = {name: value for name, value in _SHORT.items() if name in fields}
    try:
        return Plan(model=model, method=method, settings=short, **{**_REST, **changes})
    except UsageError:
        assert changes.get("parallel") == "fsdp"
        return None


def _tasks(model: str) -> dict[tuple[str, str, str], Plan]:
    """By what is done, ``--parallel`` and the method (or what else is peculiar)."""
    found: dict[tuple[str, str, str], Plan | None] = {}
    for method in registry.names():
        for parallel in ("ddp", "fsdp"):
            changes = {"gpus": 2, "parallel": parallel}
            found["losses", parallel, method] = _plan(model, method, **changes)
            if method in _RECORDED:
                found["tape", parallel, method] = _plan(model, method, **changes)
    for parallel in ("ddp", "fsdp"):
        changes = {"gpus": 2, "parallel": parallel}
        for name, more in _VARIANTS.items():
            found["tape", parallel, name] = _plan(model, "full", **changes, **more)
        found["losses", parallel, "accumulated"] = _plan(model, "full", grad_accum=3, **changes)
    return {key: plan for key, plan in found.items() if plan is not None}


# What benchmarks/parallel_memory.py records of all of them: blocks that take turns, gradients freed
# in backward, an update at its owner, a restart of whole layers.
_RECORDED = ("badam", "galore", "lomo", "sltrain-restarts")
_VARIANTS: dict[str, dict[str, Any]] = {
    "accumulated": {"grad_accum": 3},
    "amp-bf16": {"dtype": "amp-bf16"},
    "checkpointed": {"checkpointing": "full", "dtype": "bf16"},
    "chunked": {"loss": "chunked"},
    "zeroed": {"zero_grad": "zero"},
}


@pytest.fixture(scope="module")
def answers(
    tiny: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, str], list[Any]]:
    """What two processes found for every task, in one process group."""
    from tests.processes import run

    tasks = _tasks(tiny)
    rows = [{"what": key[0], "plan": plan.as_dict()} for key, plan in tasks.items()]
    (found,) = run([(2, rows)], tmp_path_factory.mktemp("processes"))
    return dict(zip(tasks, found, strict=True))


@cache
def _alone(model: str, method: str, rows: int) -> list[float]:
    """The losses of one process with all the rows."""
    from tests.processes import losses

    plan = _plan(model, method, micro_batch=rows)
    assert plan is not None
    return list(losses(plan)["losses"])


def test_two_processes_train_as_one(
    tiny: str, answers: dict[tuple[str, str, str], list[Any]]
) -> None:
    """Every method, with its periodic events: losses within 1e-4 of one process's, and the same
    weights on both.
    """
    wrong = []
    for (what, parallel, method), (first, second) in answers.items():
        if what != "losses":
            continue
        accumulated = method == "accumulated"
        alone = _alone(tiny, "full" if accumulated else method, 12 if accumulated else 4)
        same = pytest.approx(alone, rel=1e-2 if _local_start(method) else 1e-4)
        if first["losses"] != second["losses"] or first["losses"] != same:
            wrong.append((parallel, method, first["losses"], second["losses"], alone))
        if parallel == "ddp" and first["weights"] != second["weights"]:
            wrong.append((parallel, method, first["weights"], second["weights"]))
    assert not wrong


def _local_start(method: str) -> bool:
    known = method in registry.names()
    return known and hasattr(registry.method(method).layer, "LOCAL_START")


def test_every_method_runs_under_ddp_and_those_refused_under_fsdp_say_why(
    answers: dict[tuple[str, str, str], list[Any]],
) -> None:
    ran = {parallel: set() for parallel in ("ddp", "fsdp")}  # type: dict[str, set[str]]
    for what, parallel, method in answers:
        if what == "losses":
            ran[parallel].add(method)
    assert ran["ddp"] >= set(registry.names())
    refused = set(registry.names()) - ran["fsdp"]
    for method in refused:
        with pytest.raises(UsageError, match=r"does not go with|: "):
            Plan(model="9m", method=method, gpus=2, parallel="fsdp")
    assert len(refused) < 6


def test_the_estimate_is_what_a_process_records(
    answers: dict[tuple[str, str, str], list[Any]], tiny: str
) -> None:
    """The peak of process 0, which has the most, within 0.1 %."""
    plans = _tasks(tiny)
    wrong = {}
    for key, found in answers.items():
        if key[0] != "tape":
            continue
        recorded = tapes.peak(Tape(**found[0])).size
        estimated = memory(work_out(plans[key])).peak.size
        if abs(estimated / recorded - 1) > 1e-3:
            wrong[key[1:]] = (recorded, estimated, estimated / recorded - 1)
    assert not wrong


def test_owners_share_evenly_and_every_thing_has_its_turn() -> None:
    found = owners([9, 1, 1, 1, 4, 4], 2)
    assert sorted(found) == [0, 0, 0, 1, 1, 1] or sum(found) in (2, 3, 4)
    loads = [
        sum(c for c, o in zip([9, 1, 1, 1, 4, 4], found, strict=True) if o == r) for r in (0, 1)
    ]
    assert loads == [10, 10]
    turns = rounds(found, 2)
    assert sorted(index for turn in turns for index in turn) == list(range(6))
    assert all(len({found[index] for index in turn}) == len(turn) for turn in turns)
    assert (held((5, 3), 2), held((), 4), held((3,), 8)) == (9, 1, 1)


def test_sharding_takes_what_it_says_from_the_estimate() -> None:
    whole = work_out(Plan(model="60m", device="cpu")).resident()
    plan = Plan(model="60m", device="cpu", gpus=4, parallel="fsdp")
    shard = work_out(plan).resident()
    assert 4 * shard["weights"] == pytest.approx(whole["weights"], rel=1e-3)
    assert 4 * shard["optimizer"] == pytest.approx(whole["optimizer"], rel=1e-3)
    replica = work_out(Plan(model="60m", device="cpu", gpus=4, parallel="ddp")).resident()
    assert replica["gradients"] == whole["weights"]
    assert replica["weights"] == whole["weights"]
    assert from_dict(plan.as_dict()) == plan


def test_tape_of_streams() -> None:
    """A block is given to its own stream only: each stream has segments of its own."""
    from effprof.allocator import replay, replay_streams

    mib = 2**20
    tape = Tape(events=[(0, 30 * mib), (0, -30 * mib), (1, 30 * mib)], roles=["workspace"] * 2)
    assert replay(tape.events, 2).peak_reserved == 30 * mib
    found = replay_streams(tape.events, 2, {1: 1})
    assert (found.peak_reserved, found.peak_allocated, found.segments) == (60 * mib, 30 * mib, 2)
