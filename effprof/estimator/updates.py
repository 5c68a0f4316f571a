"""Updates of a model on a graph: micro-steps, then what each optimizer half allocates and keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from effprof.estimator.autograd import Graph, Leaf, Storage, Value
from effprof.estimator.decoder import Decoder
from effprof.estimator.replicas import Replicas
from effprof.gpus import Gpu
from effprof.model import Matrix
from effprof.plan import Plan
from effprof.registry import INTEGERS, Clock, Tensor, phases
from effprof.shards import held
from effprof.step import Step, Unit, layer_of
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
    owner: int = 0  # the process that updates it, where tensors are sharded

    @property
    def leaves(self) -> Iterator[Leaf]:
        return (value.node for value in self.weights if isinstance(value.node, Leaf))


@dataclass(frozen=True, slots=True)
class _Recording:
    """Where a micro-step is on the tape: its events (start, turn to backward, end), its storages
    (first, last), and the gradients it left: (storage, bytes of it, numel, itemsize), or None where
    they lie in a bucket.
    """

    events: tuple[int, int, int]
    storages: tuple[int, int]
    gradients: list[tuple[int, int, int, int] | None]


_Key = tuple[bool, tuple[tuple[int, bool], ...]]


def replayed(plan: Plan) -> int:
    """The micro-steps of an update that stand for all: a first and a later one; where only the last
    is reduced, one between them.
    """
    return min(plan.grad_accum, 3 if plan.parallel == "ddp" else 2)


def _kept(leaf: Leaf) -> Value | None:
    return leaf.gradient if leaf.shard is None else leaf.shard


def _apart(replicas: Replicas, leaf: Leaf) -> bool:
    return leaf.gradient is not None and not replicas.holds(leaf)


class Run:
    """A model with its optimizer state, updated a few times on one graph."""

    def __init__(self, graph: Graph, step: Step, gpu: Gpu) -> None:
        self.graph = graph
        self.step = step
        self.plan = step.plan
        graph.tape.mark("build", "build")
        self.decoder = Decoder(graph, step, gpu)
        placed = [(name, unit, one) for name, unit in step.placed for one in unit.trained]
        self.cells = [
            _Cell(
                name,
                one,
                tuple(self.decoder.weights[name][t.name] for t in one.tensors),
                unit.layer_half,
                owner=owner,
            )
            for (name, unit, one), owner in zip(placed, step.owners, strict=True)
        ]
        self.seen: dict[_Key, _Recording] = {}
        self.reached: set[_Key] = set()
        self.number = 0
        self.replicas: Replicas | None = None
        if self.plan.per_layer_update:
            self.by_leaf = {id(leaf): cell for cell in self.cells for leaf in cell.leaves}
            graph.on_gradient = self.update_in_backward
        elif self.plan.parallel == "ddp":
            self.replicas = Replicas(graph)
            graph.on_gradient = self.replicas.receive
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
        if self.replicas is not None:
            self.replicas.wrap(self._reducible())
        micro_steps = replayed(self.plan)
        for turn in range(1, micro_steps + 1):
            self.micro_step(kind, last=turn == micro_steps)
        self._before_step(kind)
        self.apply(kind)
        if self.plan.zero_grad == "none":
            for _, leaf in self._parameters():
                leaf.gradient = leaf.shard = None

    def place_gradients(self) -> None:
        """Every gradient that is not there, as a backward before would have left it."""
        if self.replicas is not None:
            self.replicas.wrap(self._reducible())
            for _, reduced in self._reducible():
                reduced.gradient = self.replicas.view(reduced)
        gpus = self.plan.gpus if self.decoder.sharded else 1
        for name, unit in self.step.placed:
            for tensor in unit.tensors:
                leaf = self.decoder.weights[name][tensor.name].node
                if isinstance(leaf, Leaf) and _kept(leaf) is None:
                    size = self.step.gradient_bytes(tensor) // tensor.numel
                    numel = held(tensor.shape, gpus)
                    made = self.graph.allocate(numel, size, leaf.label, "gradients")
                    if self.decoder.sharded is None:
                        leaf.gradient = made
                    else:
                        leaf.shard = made

    def place_states(self) -> None:
        """Every optimizer state, as the first update leaves it."""
        for cell in self.cells:
            self._allocate_state(cell)

    def apply(self, kind: str) -> None:
        """The step and a restart, with every gradient there is."""
        self.graph.tape.mark(kind, "update")
        if not self.plan.per_layer_update:
            self._hosted_update()
            self._own_updates(kind)
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
        gpus = self.plan.gpus if self.decoder.sharded else 1
        if self.replicas is not None:
            self.replicas.wrap(self._reducible())
        elif self.plan.zero_grad == "zero":
            for value, leaf in self._parameters():
                numel = -(-value.numel // gpus)
                if value.needs_grad:
                    leaf.shard = graph.allocate(numel, value.itemsize, leaf.label, "gradients")
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
                    leaf.gradient = leaf.shard = None
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

    def _reducible(self) -> list[tuple[Value, Leaf]]:
        """What DDP reduces: parameters that need a gradient, of autograd's making."""
        integers = {
            f"{name[:-6]}{tensor.name}"
            for name, unit in self.step.placed
            for tensor in unit.tensors
            if tensor.dtype in INTEGERS
        }
        return [
            (value, leaf)
            for value, leaf in self._parameters()
            if value.needs_grad and leaf.label not in integers
        ]

    def micro_step(self, kind: str, *, last: bool = True) -> None:
        """Forward and backward.

        What ran before with gradients as they are now is repeated event by event.
        """
        graph, tape, replicas = self.graph, self.graph.tape, self.replicas
        tape.mark(kind, "forward")
        if replicas is not None:
            replicas.begin()
            replicas.syncing = last
        leaves = [leaf for value, leaf in self._parameters() if value.needs_grad]
        key = (last, tuple((id(leaf), _kept(leaf) is not None) for leaf in leaves))
        fresh = [leaf for leaf in leaves if _kept(leaf) is None]
        again = kind == "periodic" and key in self.reached
        if kind != "first":
            self.reached.add(key)
        if key in self.seen:
            self._repeat(kind, fresh, self.seen[key], again=again)
            return
        # Gradients that moved into their buckets were not born in this micro-step: no repetition.
        moved = replicas is not None and last and any(_apart(replicas, leaf) for leaf in leaves)
        first_event, first_storage = len(tape.events), len(tape.roles)
        ids = graph.allocate(self.plan.positions, 8, "input_ids", "activations")
        loss, logits = self.decoder.forward(ids, ids)
        graph.mark_activation(logits)
        kept = logits if self.plan.keep_logits else None
        del logits
        turn = len(tape.events)
        tape.mark(kind, "backward")
        graph.backward(loss)
        if self.decoder.sharded is not None:
            self.decoder.sharded.finish()
        del kept, ids, loss
        if not self.plan.per_layer_update and not moved:  # whose first update also allocates states
            made = [_kept(leaf) for leaf in fresh]
            gradients = [None if v is None or v.storage.index < first_storage else v for v in made]
            places = [
                None if v is None else (v.storage.index, v.storage.size, v.numel, v.itemsize)
                for v in gradients
            ]
            span = (first_event, turn, len(tape.events))
            self.seen[key] = _Recording(span, (first_storage, len(tape.roles)), places)

    def _repeat(self, kind: str, fresh: list[Leaf], recording: _Recording, *, again: bool) -> None:
        """Append a recorded micro-step's events again, with new storages for its own.

        Where an update with every state has run it (``again``), only its gradients come: the peak
        has been reached.
        """
        tape, graph = self.graph.tape, self.graph
        (start, turn, end), (first, last) = recording.events, recording.storages
        offset = len(tape.roles) - first
        if not again:
            events = tape.events
            events += [(storage + offset, size) for storage, size in events[start:turn]]
            tape.mark(kind, "backward")
            events += [(storage + offset, size) for storage, size in events[turn:end]]
            tape.roles += tape.roles[first:last]
            tape.labels += tape.labels[first:last]
            for storage, stream in tuple(tape.streams.items()):
                if first <= storage < last:
                    tape.streams[storage + offset] = stream
        made: dict[int, Storage] = {}
        for leaf, place in zip(fresh, recording.gradients, strict=True):
            if place is None:
                leaf.gradient = self.replicas.view(leaf) if self.replicas else None
                continue
            index, size, numel, itemsize = place
            if index not in made:
                made[index] = (
                    graph.allocate(size, 1, leaf.label, "gradients").storage
                    if again
                    else Storage(graph, index + offset, size)
                )
            value = Value(made[index], numel, itemsize)
            if self.decoder.sharded is None:
                leaf.gradient = value
            else:
                leaf.shard = value

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

    def _own_updates(self, kind: str) -> None:
        """Every cell that torch does not update; where they are sharded, process 0's with the whole
        of its weights and gradients beside it.
        """
        for cell in self.cells:
            if not cell.active or cell.trained.hosted or cell.owner:
                continue
            whole = self._gathered(cell) if self.decoder.sharded else []
            self._own_update(cell, kind)
            del whole

    def _gathered(self, cell: _Cell) -> list[Value]:
        return [
            self._whole(tensor, f"whole_{what}")
            for what in ("gradient", "weight")
            for tensor in cell.trained.tensors
        ]

    def _whole(self, tensor: Tensor, label: str) -> Value:
        """A sharded tensor gathered from every process, by gloo through one more like it."""
        numel = held(tensor.shape, self.plan.gpus) * self.plan.gpus
        made = self.graph.allocate(numel, self.step.itemsize(tensor.dtype), label)
        if self.graph.on_cpu:
            self.graph.allocate(made.numel, made.itemsize, "gloo")
        return made

    def _hosted_update(self) -> None:
        """torch's AdamW: nothing when fused, one copy of all it moves as foreach, two of one
        tensor as a loop.
        """
        hosted = [cell for cell in self.cells if cell.active and cell.trained.hosted]
        for cell in hosted:
            self._allocate_state(cell)
        held_back = []
        for cell in hosted:
            self.graph.module = f"optimizer.{cell.name}."
            made = self._temporaries(self._transient(cell))
            if self.plan.optimizer_impl == "foreach":
                held_back += made
            del made

    def _transient(self, cell: _Cell) -> tuple[Tensor, ...]:
        """What torch's optimizer holds for a cell."""
        found = cell.trained.transient.get(self.plan.optimizer_impl, ())
        if self.decoder.sharded is None:
            return found
        return tuple(replace(one, shape=(self._local(cell, one),)) for one in found)

    def _local(self, cell: _Cell, tensor: Tensor) -> int:
        """Numbers that process 0 has of a tensor: torch's own optimizers work on shards."""
        sharded = self.decoder.sharded is not None and cell.trained.hosted and tensor.shape
        return held(tensor.shape, self.plan.gpus) if sharded else tensor.numel

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
        elsewhere = {cell.name for cell in self.cells if cell.owner}
        for name, unit in self.step.placed:
            if unit.layer_half and name not in elsewhere:
                self.graph.module = f"{name[:-6]}restart."
                whole = self._whole_layer(unit) if self.decoder.sharded else []
                self._stages(unit.transient, "restart")
                del whole

    def _whole_layer(self, unit: Unit) -> list[Value]:
        """A replaced matrix with the states that torch keeps as shards, gathered at its owner."""
        states = [t for one in unit.trained if one.hosted for t in one.state if t.shape]
        weights = [tensor for tensor in unit.tensors if tensor.role == "weights"]
        return [self._whole(tensor, f"whole_{tensor.name}") for tensor in (*weights, *states)]

    def _allocate_state(self, cell: _Cell) -> None:
        if cell.state or (cell.owner and not cell.trained.hosted):
            return
        outer = self.graph.module
        stem = cell.name.removesuffix(".weight")
        self.graph.module = f"{stem}.{cell.trained.tensors[0].name}."
        for tensor in self.step.held(cell.trained):
            size = self.step.itemsize(tensor.dtype)
            numel = self._local(cell, tensor)
            cell.state.append(self.graph.allocate(numel, size, tensor.name, "optimizer"))
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
