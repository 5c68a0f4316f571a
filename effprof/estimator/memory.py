"""Memory of a plan: a tape synthesized from its Step, replayed, and what it says at its peak."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from effprof import allocator
from effprof import tape as tapes
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
    reserved: int | None
    context: int | None
    tape: Tape
    blocks: list[int] | None

    @property
    def process_total(self) -> int | None:
        """What NVML would report for the process."""
        return (
            None if self.reserved is None or self.context is None else self.reserved + self.context
        )


def memory(step: Step, gpu: Gpu = DEFAULT) -> Memory:
    """Synthesize and replay a plan's tape as ``gpu`` runs it."""
    with _no_collector():
        return measure(step.plan, synthesize(step, gpu), gpu)


def measure(plan: Plan, tape: Tape, gpu: Gpu = DEFAULT) -> Memory:
    """Replay a plan's tape, wherever it comes from, as the plan's device would run it."""
    if plan.device == "cpu":
        peak = tapes.peak(tape)
        return Memory(peak, peak.size, None, None, tape, None)
    expandable = plan.allocator == "expandable"
    replay = allocator.replay(tape.events, len(tape.roles), expandable=expandable)
    peak = tapes.peak(tape, replay.blocks)
    return Memory(
        peak, replay.peak_requested, replay.peak_reserved, gpu.context, tape, replay.blocks
    )


def synthesize(step: Step, gpu: Gpu = DEFAULT) -> Tape:
    """The tape of build, a first update, a steady one and each periodic one the method has."""
    tape = Tape()
    graph = Graph(tape)
    run = Run(graph, step, gpu.workspace)
    for kind, number in step.plan.updates:
        run.update(kind, number)
    graph.close()
    return tape


@contextmanager
def _no_collector() -> Iterator[None]:
    """Values are freed by reference counts alone: the cycle collector would only cost time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
