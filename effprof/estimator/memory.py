"""Memory of a plan: a tape synthesized from its Step, replayed, and what it says at its peak."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from effprof import allocator
from effprof import tape as tapes
from effprof.estimator.autograd import Graph, Leaf, Storage, Value
from effprof.estimator.decoder import Decoder
from effprof.gpus import DEFAULT, Gpu
from effprof.step import Step, Trained
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
        return _measure(step, synthesize(step, gpu), gpu)


def _measure(step: Step, tape: Tape, gpu: Gpu) -> Memory:
    if step.plan.device == "cpu":
        peak = tapes.peak(tape)
        return Memory(peak, peak.size, None, None, tape, None)
    expandable = step.plan.allocator == "expandable"
    replay = allocator.replay(tape.events, len(tape.roles), expandable=expandable)
    peak = tapes.peak(tape, replay.blocks)
    return Memory(
        peak, replay.peak_requested, replay.peak_reserved, gpu.context, tape, replay.blocks
    )


def synthesize(step: Step, gpu: Gpu = DEFAULT) -> Tape:
    """The tape of build, a first update, a steady one and, where the method has one, a periodic
    one.
    """
    tape = Tape()
    graph = Graph(tape)
    run = _Run(graph, step, gpu.workspace)
    for kind in ("first", "steady", *(("periodic",) if step.plan.halves.periods else ())):
        run.update(kind)
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


class _Run:
    """A model with its optimizer state, updated a few times on one graph."""

    def __init__(self, graph: Graph, step: Step, workspace: int) -> None:
        self.graph = graph
        self.step = step
        self.plan = step.plan
        graph.tape.mark("build", "build")
        self.decoder = Decoder(graph, step)
        self.trained = [
            (name, trained, self.decoder.weights[name][trained.tensor.name])
            for name, unit in step.placed
            for trained in unit.trained
        ]
        self.leaves = [value.node for _, _, value in self.trained if isinstance(value.node, Leaf)]
        self.state: list[Value] = []
        self.seen: dict[bool, tuple[int, int, int, int, int]] = {}
        self.gradients: list[tuple[int, int, int]] = []
        # cuBLAS keeps one workspace per handle, and backward's thread has a handle of its own.
        threads = ("forward", "backward") if self.plan.device == "cuda" else ()
        self.workspaces = [graph.allocate(workspace, 1, f"cublas_{thread}") for thread in threads]

    def update(self, kind: str) -> None:
        """One optimizer update with its micro-steps: forward, backward, the step, zero_grad."""
        graph, tape = self.graph, self.graph.tape
        for _ in range(min(self.plan.grad_accum, 2)):  # a first and a later micro-step say it all
            self._micro_step(kind)
        refreshes = bool(self.plan.halves.periods) and kind in ("first", "periodic")
        tape.mark(kind, "update")
        graph.module = "optimizer."
        if kind == "first":
            self._allocate_state()
        self._hosted_update()
        for _, trained, _ in self.trained:
            if trained.hosted:
                continue
            if refreshes and trained.covered:
                tape.mark(kind, "refresh")
                self._transient(trained, "refresh")
                tape.mark(kind, "update")
            self._transient(trained, "update")
        graph.module = ""
        if self.plan.zero_grad == "none":
            for leaf in self.leaves:
                leaf.gradient = None

    def _micro_step(self, kind: str) -> None:
        """Forward and backward.

        What ran before with gradients as they are now is repeated event by event.
        """
        graph, tape = self.graph, self.graph.tape
        tape.mark(kind, "forward")
        present = self.leaves[0].gradient is not None
        if present in self.seen:
            self._repeat(kind, *self.seen[present])
            return
        first_event, first_storage = len(tape.events), len(tape.roles)
        ids = graph.allocate(self.plan.positions, 8, "input_ids", "activations")
        loss, logits = self.decoder.forward(ids, ids)
        graph.mark_activation(logits)
        kept = logits if self.plan.keep_logits else None
        del logits
        turn = len(tape.events)
        tape.mark(kind, "backward")
        graph.backward(loss)
        del kept, ids, loss
        if not present:
            values = [leaf.gradient for leaf in self.leaves if leaf.gradient is not None]
            self.gradients = [(v.storage.index, v.numel, v.itemsize) for v in values]
        self.seen[present] = (first_event, turn, len(tape.events), first_storage, len(tape.roles))

    def _repeat(self, kind: str, start: int, turn: int, end: int, first: int, last: int) -> None:
        """Append events ``start`` to ``end`` again, with new storages for ``first`` to ``last``."""
        tape = self.graph.tape
        offset = len(tape.roles) - first
        events = tape.events
        events += [(storage + offset, size) for storage, size in events[start:turn]]
        tape.mark(kind, "backward")
        events += [(storage + offset, size) for storage, size in events[turn:end]]
        tape.roles += tape.roles[first:last]
        tape.labels += tape.labels[first:last]
        if self.leaves[0].gradient is None:
            for leaf, (index, numel, itemsize) in zip(self.leaves, self.gradients, strict=True):
                storage = Storage(self.graph, index + offset, numel * itemsize)
                leaf.gradient = Value(storage, numel, itemsize)

    def _allocate_state(self) -> None:
        for name, trained, _ in self.trained:
            self.graph.module = f"{name[:-6]}{trained.tensor.name}."
            for tensor in trained.state:
                self.state.append(
                    self.graph.allocate(
                        tensor.numel, self.step.itemsize(tensor.dtype), tensor.name, "optimizer"
                    )
                )
        self.graph.module = "optimizer."

    def _hosted_update(self) -> None:
        """torch's AdamW: nothing when fused, one copy of all it moves as foreach, two of one
        tensor as a loop.
        """
        sizes = [
            (t.tensor.numel, self.step.itemsize(t.tensor.dtype))
            for _, t, _ in self.trained
            if t.hosted
        ]
        if self.plan.optimizer_impl == "foreach":
            held = [self.graph.allocate(*size, "foreach_denominator") for size in sizes]
            del held
        elif self.plan.optimizer_impl == "loop":
            for size in sizes:
                held = [self.graph.allocate(*size, "denominator") for _ in range(2)]
                del held

    def _transient(self, trained: Trained, phase: str) -> None:
        held = [
            self.graph.allocate(tensor.numel, self.step.itemsize(tensor.dtype), tensor.name)
            for tensor in trained.transient.get(phase, ())
        ]
        del held
