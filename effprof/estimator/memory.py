"""Memory of a plan: a tape synthesized from its Step, replayed, and what it says at its peak."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from effprof import allocator
from effprof import tape as tapes
from effprof.allocator import Replay
from effprof.estimator.autograd import Graph
from effprof.estimator.updates import Run
from effprof.gpus import DEFAULT, Gpu
from effprof.plan import Plan
from effprof.step import Step
from effprof.tape import Peak, Tape


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes at the peak, by role, and above it. CUDA's figures are None on the CPU."""

    peak: Peak
    requested: int
    replay: Replay | None
    context: int | None
    tape: Tape

    @property
    def reserved(self) -> int | None:
        """What max_memory_reserved would say."""
        return None if self.replay is None else self.replay.peak_reserved

    @property
    def blocks(self) -> list[int] | None:
        """Each storage's size in the allocator, unsplit tail included."""
        return None if self.replay is None else self.replay.blocks

    def as_dict(self) -> dict[str, Any]:
        """The JSON object: bytes by role at the peak, and what lies above them."""
        peak, replay = self.peak, self.replay
        return {
            **peak.by_role,
            "peak_phase": peak.phase,
            "peak_update": peak.update,
            "peak_allocated": peak.size,
            "peak_reserved": self.reserved,
            "context": self.context,
            "process_total": self.process_total,
            "peak_requested": self.requested,
            "segments": None if replay is None else replay.segments,
        }

    @property
    def process_total(self) -> int | None:
        """What NVML would report for the process."""
        return (
            None if self.reserved is None or self.context is None else self.reserved + self.context
        )


def memory(step: Step, gpu: Gpu = DEFAULT) -> Memory:
    """Synthesize and replay a plan's tape as ``gpu`` runs it."""
    with no_collector():
        return measure(step.plan, synthesize(step, gpu), gpu)


def measure(plan: Plan, tape: Tape, gpu: Gpu = DEFAULT) -> Memory:
    """Replay a plan's tape, wherever it comes from, as the plan's device would run it."""
    if plan.device == "cpu":
        peak = tapes.peak(tape)
        return Memory(peak, peak.size, None, None, tape)
    settings = allocator.Settings.of(plan.allocator)
    replay = allocator.replay_streams(tape.events, len(tape.roles), tape.streams, settings)
    peak = tapes.peak(tape, replay.blocks)
    return Memory(peak, replay.peak_requested, replay, gpu.outside(plan.gpus), tape)


def synthesize(step: Step, gpu: Gpu = DEFAULT) -> Tape:
    """The tape of build, a first update, a steady one and each periodic one the method has."""
    tape = Tape()
    graph = Graph(tape, on_cpu=step.plan.device == "cpu")
    run = Run(graph, step, gpu)
    for kind, number in step.plan.updates:
        run.update(kind, number)
    graph.close()
    return tape


def evaluation(step: Step, gpu: Gpu = DEFAULT) -> Memory:
    """Memory of a validation batch of the plan's rows, after an update."""
    with no_collector():
        tape = Tape()
        graph = Graph(tape, on_cpu=step.plan.device == "cpu")
        run = Run(graph, step, gpu)
        run.evaluate()
        graph.close()
        return measure(step.plan, tape, gpu)


@contextmanager
def no_collector() -> Iterator[None]:
    """Values are freed by reference counts alone: the cycle collector would only cost time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
