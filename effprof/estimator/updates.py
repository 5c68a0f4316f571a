"""Updates of a model on a graph: micro-steps, then what each optimizer half allocates and keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from effprof.estimator.autograd import Graph, Leaf, Storage, Value
from effprof.estimator.decoder import Decoder
from effprof.gpus import Gpu
from effprof.model import Matrix
from effprof.registry import Clock, Tensor, phases
from effprof.step import Step, layer_of
from effprof.trained import Trained


@dataclass(slots=True)
class _Cell:
    """What is trained together, with the states it holds now."""

    name: str
    trained: Trained
    weights: tuple[Value, ...]
    targeted: bool
    state: list[Value] = field(default_factory=list)
    active: bool = True

    @property
    def leaves(self) -> Iterator[Leaf]:
        return (value.node for value in self.weights if isinstance(value.node, Leaf))


@dataclass(frozen=True, slots=True)
class _Recording:
    """Where a micro-step is on the tape: its events (start, turn to backward, end), its storages
    (first, last), and the gradients it left: (storage, numel, itemsize).
    """

    events: tuple[int, int, int]
    storages: tuple[int, int]
    gradients: list[tuple[int, int, int]]


class Run:
    """A model with its optimizer state, updated a few times on one graph."""

    def __init__(self, graph: Graph, step: Step, gpu: Gpu) -> None:
        self.graph = graph
        self.step = step
        self.plan = step.plan
        graph.tape.mark("build", "build")
        self.decoder = Decoder(graph, step, gpu)
        self.cells = [
            _Cell(
                name,
                one,
                tuple(self.decoder.weights[name][t.name] for t in one.tensors),
                unit.layer_half,
            )
            for name, unit in step.placed
            for one in unit.trained
        ]
        self.seen: dict[tuple[tuple[int, bool], ...], _Recording] = {}
        self.reached: set[tuple[tuple[int, bool], ...]] = set()
        self.number = 0
        if self.plan.per_layer_update:
            self.by_leaf = {id(leaf): cell for cell in self.cells for leaf in cell.leaves}
            graph.on_gradient = self.update_in_backward
        # cuBLAS keeps one workspace per handle, and backward's thread has a handle of its own.
        threads = ("forward", "backward") if self.plan.device == "cuda" else ()
        self.workspaces = [
            graph.allocate(gpu.workspace, 1, f"cublas_{thread}") for thread in threads
        ]

    def update(self, kind: str, number: int) -> None:
        """The optimizer update of that number: its micro-steps, the step, zero_grad, a restart."""
        self.number = number
        self._activate()
        if number and getattr(self.plan.halves.update, "ACTIVE_STATE", False):
            for cell in self.cells:  # a turn that has begun
                if cell.active:
                    self._allocate_state(cell)
        for _ in range(min(self.plan.grad_accum, 2)):  # a first and a later micro-step say it all
            self.micro_step(kind)
        self._before_step(kind)
        self.apply(kind)
        if self.plan.zero_grad == "none":
            for _, leaf in self._parameters():
                leaf.gradient = None

    def place_gradients(self) -> None:
        """Every gradient that is not there, as a backward before would have left it."""
        for name, unit in self.step.placed:
            for tensor in unit.tensors:
                leaf = self.decoder.weights[name][tensor.name].node
                if isinstance(leaf, Leaf) and leaf.gradient is None:
                    size = self.step.gradient_bytes(tensor)
                    leaf.gradient = self.graph.allocate(size, 1, leaf.label, "gradients")

    def place_states(self) -> None:
        """Every optimizer state, as the first update leaves it."""
        for cell in self.cells:
            self._allocate_state(cell)

    def apply(self, kind: str) -> None:
        """The step and a restart, with every gradient there is."""
        self.graph.tape.mark(kind, "update")
        if not self.plan.per_layer_update:
            self._hosted_update()
            for cell in self.cells:
                if cell.active and not cell.trained.hosted:
                    self._own_update(cell, kind)
        self._restart(kind)
        self.graph.module = ""

    def evaluate(self) -> None:
        """A validation batch between updates: states are held, nothing is kept for a backward."""
        graph = self.graph
        self.number = 1
        self._activate()
        for cell in self.cells:
            if cell.active:
                self._allocate_state(cell)
        for value, leaf in self._parameters() if self.plan.zero_grad == "zero" else ():
            if value.needs_grad:
                leaf.gradient = graph.allocate(value.numel, value.itemsize, leaf.label, "gradients")
        graph.tape.mark("evaluation", "forward")
        graph.recording = False
        ids = graph.allocate(self.plan.positions, 8, "input_ids", "activations")
        loss, logits = self.decoder.forward(ids, ids)
        del loss, logits, ids

    def _activate(self) -> None:
        """Let those tensors need a gradient that this update trains; free states left behind."""
        recipe = self.plan.recipe
        clock = Clock(self.number, since_restart=self.number)
        for half, settings in recipe.hooked():
            if not hasattr(half, "active"):
                continue
            flags = half.active([self._matrix(cell) for cell in self.cells], clock, settings)
            for cell, active in zip(self.cells, flags, strict=True):
                cell.active = active
                for value in cell.weights:
                    value.needs_grad = active
                for leaf in () if active else cell.leaves:
                    leaf.gradient = None
                if not active and getattr(half, "ACTIVE_STATE", False):
                    cell.state = []
        layer_half: Any = self.plan.halves.layer
        if not hasattr(layer_half, "differentiated"):
            return
        names = layer_half.differentiated(self.plan.layer_settings, self.number)
        for name, unit in self.step.placed:
            for tensor in unit.tensors if unit.layer_half else ():
                self._differentiate(name, tensor, wanted=tensor.name in names)
        for cell in self.cells:
            cell.active = not cell.targeted or cell.trained.tensors[0].name in names

    def _differentiate(self, name: str, tensor: Tensor, *, wanted: bool) -> None:
        """Whether one tensor of a layer half has a gradient in this update."""
        value = self.decoder.weights[name][tensor.name]
        value.needs_grad = wanted
        if wanted and value.node is None:
            value.node = Leaf(f"{name[:-6]}{tensor.name}")
        if not wanted and isinstance(value.node, Leaf):
            value.node.gradient = None

    def _matrix(self, cell: _Cell) -> Matrix:
        return replace(cell.trained.matrix, layer=layer_of(cell.name))

    def _parameters(self) -> list[tuple[Value, Leaf]]:
        """Every tensor that may have a gradient, in the model's order, with where it ends."""
        values = [v for weights in self.decoder.weights.values() for v in weights.values()]
        return [(value, value.node) for value in values if isinstance(value.node, Leaf)]

    def micro_step(self, kind: str) -> None:
        """Forward and backward.

        What ran before with gradients as they are now is repeated event by event.
        """
        graph, tape = self.graph, self.graph.tape
        tape.mark(kind, "forward")
        leaves = [leaf for value, leaf in self._parameters() if value.needs_grad]
        key = tuple((id(leaf), leaf.gradient is not None) for leaf in leaves)
        fresh = [leaf for leaf in leaves if leaf.gradient is None]
        again = kind == "periodic" and key in self.reached
        if kind != "first":
            self.reached.add(key)
        if key in self.seen:
            self._repeat(kind, fresh, self.seen[key], again=again)
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
        if not self.plan.per_layer_update:  # whose first update also allocates states
            made = [leaf.gradient for leaf in fresh if leaf.gradient is not None]
            gradients = [(v.storage.index, v.numel, v.itemsize) for v in made]
            span = (first_event, turn, len(tape.events))
            self.seen[key] = _Recording(span, (first_storage, len(tape.roles)), gradients)

    def _repeat(self, kind: str, fresh: list[Leaf], recording: _Recording, *, again: bool) -> None:
        """Append a recorded micro-step's events again, with new storages for its own.

        Where an update with every state has run it (``again``), only its gradients come: the peak
        has been reached.
        """
        tape, graph = self.graph.tape, self.graph
        if again:
            for leaf, (_, numel, size) in zip(fresh, recording.gradients, strict=True):
                leaf.gradient = graph.allocate(numel, size, leaf.label, "gradients")
            return
        (start, turn, end), (first, last) = recording.events, recording.storages
        offset = len(tape.roles) - first
        events = tape.events
        events += [(storage + offset, size) for storage, size in events[start:turn]]
        tape.mark(kind, "backward")
        events += [(storage + offset, size) for storage, size in events[turn:end]]
        tape.roles += tape.roles[first:last]
        tape.labels += tape.labels[first:last]
        for leaf, (index, numel, size) in zip(fresh, recording.gradients, strict=True):
            leaf.gradient = Value(Storage(graph, index + offset, numel * size), numel, size)

    def update_in_backward(self, leaf: Leaf) -> None:
        """What ``--per-layer-update`` does when a gradient is complete: update, and free it."""
        cell = self.by_leaf.get(id(leaf))
        if cell is None or any(one.gradient is None for one in cell.leaves):
            return
        graph = self.graph
        outer, recording = graph.module, graph.recording
        graph.recording = False
        if cell.trained.hosted:
            self._allocate_state(cell)
            graph.module = f"optimizer.{cell.name}."
            self._hold(cell.trained.transient.get(self.plan.optimizer_impl, ()))
        else:
            self._own_update(cell, "")
        graph.recording, graph.module = recording, outer
        for one in cell.leaves:
            one.gradient = None

    def _before_step(self, kind: str) -> None:
        """A layer half's refresh: its temporaries, its factors' gradients, the dense ones' end."""
        half: Any = self.plan.halves.layer
        settings = self.plan.layer_settings
        if not hasattr(half, "before_step") or "refresh" not in phases(half, settings, self.number):
            return
        self.graph.tape.mark(kind, "refresh")
        for name, unit in self.step.placed:
            if not unit.layer_half:
                continue
            self._stages(unit.transient, "refresh")
            for tensor in unit.tensors:
                leaf = self.decoder.weights[name][tensor.name].node
                if isinstance(leaf, Leaf):
                    size = self.step.itemsize(tensor.dtype)
                    leaf.gradient = (
                        self.graph.allocate(tensor.numel, size, leaf.label, "gradients")
                        if tensor.trainable
                        else None
                    )
        for cell in self.cells:
            cell.active = True

    def _hosted_update(self) -> None:
        """torch's AdamW: nothing when fused, one copy of all it moves as foreach, two of one
        tensor as a loop.
        """
        hosted = [cell for cell in self.cells if cell.active and cell.trained.hosted]
        for cell in hosted:
            self._allocate_state(cell)
        held = []
        for cell in hosted:
            self.graph.module = f"optimizer.{cell.name}."
            tensors = cell.trained.transient.get(self.plan.optimizer_impl, ())
            made = self._temporaries(tensors)
            if self.plan.optimizer_impl == "foreach":
                held += made
            del made

    def _own_update(self, cell: _Cell, kind: str) -> None:
        """A half's own function, phase by phase; in backward (no kind) phases are not marked."""
        self._allocate_state(cell)
        self.graph.module = f"optimizer.{cell.name}."
        tape, trained = self.graph.tape, cell.trained
        half, settings = self.plan.recipe.half(covered=trained.covered)
        for phase in phases(half, settings, self.number):
            if kind and phase == "refresh":
                tape.mark(kind, phase)
            self._stages(trained.transient, phase)
            if kind and phase == "refresh":
                tape.mark(kind, "update")

    def _restart(self, kind: str) -> None:
        """What a layer half does to its own tensors after the step."""
        half, settings = self.plan.halves.layer, self.plan.layer_settings
        if half is None or "restart" not in phases(half, settings, self.number):
            return
        self.graph.tape.mark(kind, "restart")
        for name, unit in self.step.placed:
            if unit.layer_half:
                self.graph.module = f"{name[:-6]}restart."
                self._stages(unit.transient, "restart")

    def _allocate_state(self, cell: _Cell) -> None:
        if cell.state:
            return
        outer = self.graph.module
        stem = cell.name.removesuffix(".weight")
        self.graph.module = f"{stem}.{cell.trained.tensors[0].name}."
        for tensor in self.step.held(cell.trained):
            size = self.step.itemsize(tensor.dtype)
            cell.state.append(self.graph.allocate(tensor.numel, size, tensor.name, "optimizer"))
        self.graph.module = outer

    def _stages(self, transient: Mapping[str, tuple[Tensor, ...]], phase: str) -> None:
        """What a phase holds at once, then what its later stages (``phase:name``) do."""
        for name, tensors in transient.items():
            if name == phase or name.startswith(f"{phase}:"):
                self._hold(tensors)

    def _hold(self, tensors: tuple[Tensor, ...]) -> None:
        held = self._temporaries(tensors)
        del held

    def _temporaries(self, tensors: tuple[Tensor, ...]) -> list[Value]:
        return [
            self.graph.allocate(tensor.numel, self.step.itemsize(tensor.dtype), tensor.name)
            for tensor in tensors
        ]
