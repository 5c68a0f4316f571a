"""Micro-steps on a graph: what ran before is repeated event by event."""

from __future__ import annotations

from dataclasses import dataclass

from effprof.estimator.autograd import Graph, Leaf, Storage, Value
from effprof.estimator.decoder import Decoder
from effprof.estimator.replicas import Replicas
from effprof.plan import Plan


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


def kept(leaf: Leaf) -> Value | None:
    """Where a leaf's gradient ends: whole, or as this process's shard of it."""
    return leaf.gradient if leaf.shard is None else leaf.shard


def _apart(replicas: Replicas, leaf: Leaf) -> bool:
    return leaf.gradient is not None and not replicas.holds(leaf)


class MicroSteps:
    """The micro-steps of a model; ``replicas`` are DDP's, where it reduces their gradients."""

    def __init__(self, graph: Graph, decoder: Decoder, replicas: Replicas | None) -> None:
        self.graph, self.decoder, self.replicas = graph, decoder, replicas
        self.plan = decoder.plan
        self._seen: dict[_Key, _Recording] = {}
        self._reached: set[_Key] = set()

    def run(self, kind: str, *, last: bool = True) -> None:
        """Forward and backward.

        What ran before with gradients as they are now is repeated event by event.
        """
        graph, tape, replicas = self.graph, self.graph.tape, self.replicas
        tape.mark(kind, "forward")
        if replicas is not None:
            replicas.begin()
            replicas.syncing = last
        leaves = [leaf for value, leaf in self.decoder.parameters() if value.needs_grad]
        key = (last, tuple((id(leaf), kept(leaf) is not None) for leaf in leaves))
        fresh = [leaf for leaf in leaves if kept(leaf) is None]
        again = kind == "periodic" and key in self._reached
        if kind != "first":
            self._reached.add(key)
        if key in self._seen:
            self._repeat(kind, fresh, self._seen[key], again=again)
            return
        # Gradients that moved into their buckets were not born in this micro-step: no repetition.
        moved = replicas is not None and last and any(_apart(replicas, leaf) for leaf in leaves)
        first_event, first_storage = len(tape.events), len(tape.roles)
        ids = graph.allocate(self.plan.positions, 8, "input_ids", "activations")
        loss, logits = self.decoder.forward(ids, ids)
        graph.mark_activation(logits)
        held = logits if self.plan.keep_logits else None
        del logits
        turn = len(tape.events)
        tape.mark(kind, "backward")
        graph.backward(loss)
        if self.decoder.sharded is not None:
            self.decoder.sharded.finish()
        del held, ids, loss
        if not self.plan.per_layer_update and not moved:  # whose first update also allocates states
            made = [kept(leaf) for leaf in fresh]
            gradients = [None if v is None or v.storage.index < first_storage else v for v in made]
            places = [
                None if v is None else (v.storage.index, v.storage.size, v.numel, v.itemsize)
                for v in gradients
            ]
            span = (first_event, turn, len(tape.events))
            self._seen[key] = _Recording(span, (first_storage, len(tape.roles)), places)

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
