"""A miniature autograd over storages: it runs a model's forward and backward without a number in
it.

Values are freed by Python's own reference counting, as PyTorch's tensors are, so a forward written
like the model's has its lifetimes; the backward engine keeps the order, the in-place sums and the
releases of torch's. Sources: torch 2.13 torch/csrc/autograd/engine.cpp, input_buffer.cpp,
functions/accumulate_grad.h; derivatives.yaml for each rule.
"""

from __future__ import annotations

import heapq
import itertools
import sys
import weakref
from collections.abc import Callable, Sequence

from effprof.tape import Tape

# getrefcount of a storage that one Value, held by the engine's buffer alone, owns: the attribute
# and the call's argument.
_SOLE_OWNER = 2


class Storage:
    """One allocation; freed on the tape when its last reference goes."""

    __slots__ = ("graph", "index", "size")

    def __init__(self, graph: Graph, index: int, size: int) -> None:
        self.graph = graph
        self.index = index
        self.size = size

    def __del__(self) -> None:
        self.graph.events.append((self.index, -self.size))


class Value:
    """A tensor without numbers: a storage seen as ``numel`` items of ``itemsize`` bytes."""

    __slots__ = ("itemsize", "needs_grad", "node", "numel", "storage", "viewed")

    def __init__(self, storage: Storage, numel: int, itemsize: int) -> None:
        self.storage = storage
        self.numel = numel
        self.itemsize = itemsize
        self.needs_grad = False
        self.node: Node | Leaf | None = None
        self.viewed = False  # a view of a tensor that autograd holds, too


Rule = Callable[["Graph", Value, list[Value]], Sequence[Value | None]]
Saving = Callable[[Value], "Value | Holder"]


class Leaf:
    """A parameter's place in the graph: where its gradient ends, or the ``shard`` of it that one
    of several processes keeps.
    """

    __slots__ = ("gradient", "label", "sequence", "shard")

    def __init__(self, label: str) -> None:
        self.label = label
        self.gradient: Value | None = None
        self.shard: Value | None = None
        self.sequence = sys.maxsize  # torch runs AccumulateGrad before any other ready node


class Node:
    """One operation's backward: its rule, what it saved, and its inputs' (node, numel,
    itemsize).
    """

    __slots__ = ("inputs", "label", "rule", "saved", "sequence")

    def __init__(
        self,
        sequence: int,
        label: str,
        rule: Rule,
        saved: list[Value | Holder],
        inputs: list[tuple[Node | Leaf | None, int, int]],
    ) -> None:
        self.sequence = sequence
        self.label = label
        self.rule = rule
        self.saved = saved
        self.inputs = inputs


class Graph:
    """Records operations on a tape and runs them backwards, as the CPU does where ``on_cpu``."""

    def __init__(self, tape: Tape, *, on_cpu: bool = False) -> None:
        self.on_cpu = on_cpu
        self.tape = tape
        self.events = tape.events
        self.roles = tape.roles
        self.labels = tape.labels
        self.module = ""
        self.recording = True
        self.saving: Saving | None = None
        self.on_gradient: Callable[[Leaf], None] | None = None
        self._sequence = 0

    def close(self) -> None:
        """Stop recording frees: what is alive now outlives the tape."""
        self.events = []

    def allocate(self, numel: int, itemsize: int, label: str, role: str = "workspace") -> Value:
        """A new storage with one value over it."""
        size = numel * itemsize
        index = len(self.roles)
        self.roles.append(role)
        self.labels.append(f"{self.module}{label}")
        if size:
            self.events.append((index, size))
        return Value(Storage(self, index, size), numel, itemsize)

    def parameter(self, numel: int, itemsize: int, label: str, *, trainable: bool) -> Value:
        """A weight; trainable ones get a gradient at its leaf."""
        value = self.allocate(numel, itemsize, label, "weights")
        value.needs_grad = trainable
        value.node = Leaf(label) if trainable else None
        return value

    def keep(self, value: Value) -> Value | Holder:
        """Save a value for backward: what only autograd holds is an activation."""
        if self.saving is not None:
            return self.saving(value)
        self.mark_activation(value)
        return value

    def mark_activation(self, value: Value) -> None:
        if self.roles[value.storage.index] == "workspace":
            self.roles[value.storage.index] = "activations"

    def attach(
        self, out: Value, label: str, inputs: Sequence[Value], saved: Sequence[Value], rule: Rule
    ) -> Value:
        """Give ``out`` its backward node, where gradients are recorded and an input needs one."""
        if self.recording and any(value.needs_grad for value in inputs):
            self._sequence += 1
            # A saved result must not own its own node: the cycle would keep both.
            kept = [self.keep(_detached(value) if value is out else value) for value in saved]
            edges = [
                (value.node if value.needs_grad else None, value.numel, value.itemsize)
                for value in inputs
            ]
            out.needs_grad = True
            out.node = Node(self._sequence, f"{self.module}{label}", rule, kept, edges)
        return out

    def checkpoint(
        self,
        function: Callable[[Value], Value],
        x: Value,
        after: Callable[[], None],
        rng_bytes: int,
    ) -> Value:
        """Run ``function`` keeping only its input.

        Backward runs it again (non-reentrant, early stop).

        ``after`` is called when a second run ends; ``rng_bytes`` of random state are kept beside
        the input.
        """
        self.mark_activation(x)
        frame = _Frame(self, function, x, after)
        frame.rng = self.allocate(rng_bytes, 1, "rng_state", "activations")
        self.saving = frame.hold
        out = function(x)
        self.saving = None
        return out

    def backward(self, loss: Value) -> None:
        """Free-running engine over the loss's graph, as torch's single-device engine orders it."""
        root = loss.node
        assert isinstance(root, Node)
        waiting = _dependencies(root)
        buffers: dict[Node | Leaf, Value] = {
            root: self.allocate(loss.numel, loss.itemsize, "d_loss")
        }
        turn = itertools.count()  # of leaves, which have one sequence, the first to be ready
        ready: list[tuple[int, int, Node | Leaf]] = [(-root.sequence, next(turn), root)]
        outer = self.module
        while ready:
            node = heapq.heappop(ready)[2]
            gradient = buffers.pop(node)
            if isinstance(node, Leaf):
                self._accumulate(node, gradient)
                del gradient
                if self.on_gradient is not None:
                    self.on_gradient(node)
                continue
            self.module = f"{node.label} backward "
            saved = [item.unpack() if isinstance(item, Holder) else item for item in node.saved]
            self.recording = False
            results = list(node.rule(self, gradient, saved))
            del saved
            for place, (target, numel, itemsize) in enumerate(node.inputs):
                result = results[place]
                if target is not None and result is not None:
                    results[place] = self._fitted(result, numel, itemsize)
                else:
                    results[place] = None
            del gradient
            result = None
            node.saved = []
            for place, (target, _, _) in enumerate(node.inputs):
                result, results[place] = results[place], None
                if target is None or result is None:
                    continue
                if target in buffers:
                    buffers[target] = self._sum(buffers.pop(target), result)
                else:
                    buffers[target] = result
                result = None
                waiting[target] -= 1
                if not waiting[target]:
                    heapq.heappush(ready, (-target.sequence, next(turn), target))
            self.recording = True
        self.module = outer

    def _fitted(self, result: Value, numel: int, itemsize: int) -> Value:
        """validate_outputs: a broadcast gradient is summed, another dtype is cast."""
        if result.numel != numel:
            result = self.allocate(numel, result.itemsize, "sum_to_size")
        if result.itemsize != itemsize:
            result = self.allocate(numel, itemsize, "cast")
        return result

    def _sum(self, old: Value, new: Value) -> Value:
        """The input buffer adds in place into the first gradient if nobody else holds it."""
        if sys.getrefcount(old.storage) <= _SOLE_OWNER and not old.viewed:
            return old
        return self.allocate(old.numel, max(old.itemsize, new.itemsize), "sum")

    def _accumulate(self, leaf: Leaf, gradient: Value) -> None:
        """AccumulateGrad takes the first gradient as it is and adds later ones in place."""
        if leaf.gradient is None:
            if sys.getrefcount(gradient.storage) > _SOLE_OWNER:
                gradient = self.allocate(gradient.numel, gradient.itemsize, "clone")
            index = gradient.storage.index
            self.roles[index] = "gradients"
            self.labels[index] = leaf.label
            leaf.gradient = gradient


class Holder:
    """What a checkpointed operation saved: nothing until its frame is run again."""

    __slots__ = ("__weakref__", "frame", "value")

    def __init__(self, frame: _Frame) -> None:
        self.frame = frame
        self.value: Value | None = None

    def unpack(self) -> Value:
        """The value, which is given away: torch's frame keeps it no longer either."""
        if self.value is None:
            self.frame.recompute()
        found, self.value = self.value, None
        assert found is not None
        return found


class _StopRecompute(Exception):  # noqa: N818 - control flow, as torch.utils.checkpoint's
    """Everything saved has been recomputed."""


class _Frame:
    """One checkpointed call."""

    __slots__ = ("after", "function", "graph", "holders", "recomputed", "rng", "x")

    def __init__(
        self, graph: Graph, function: Callable[[Value], Value], x: Value, after: Callable[[], None]
    ) -> None:
        self.graph = graph
        self.function = function
        self.x = x
        self.after = after
        self.rng: Value | None = None
        self.holders: list[weakref.ref[Holder]] = []
        self.recomputed = 0

    def hold(self, value: Value) -> Holder:
        holder = Holder(self)
        self.holders.append(weakref.ref(holder))
        return holder

    def give(self, value: Value) -> Value:
        self.graph.mark_activation(value)
        holder = self.holders[self.recomputed]()
        self.recomputed += 1
        if holder is not None:
            # Detached: the inner graph must not live on through what it recomputed.
            holder.value = _detached(value)
        if self.recomputed == len(self.holders):
            raise _StopRecompute
        return value

    def recompute(self) -> None:
        graph = self.graph
        outer = graph.module, graph.recording, graph.saving
        graph.recording, graph.saving, graph.module = True, self.give, ""
        self.recomputed = 0
        try:
            self.function(self.x)
        except _StopRecompute:
            self.after()
        graph.module, graph.recording, graph.saving = outer


def _detached(value: Value) -> Value:
    return Value(value.storage, value.numel, value.itemsize)


def _dependencies(root: Node) -> dict[Node | Leaf, int]:
    """How many gradients each node waits for."""
    count: dict[Node | Leaf, int] = {}
    stack: list[Node | Leaf] = [root]
    seen: set[Node | Leaf] = {root}
    while stack:
        node = stack.pop()
        if isinstance(node, Leaf):
            continue
        for target, _, _ in node.inputs:
            if target is None:
                continue
            count[target] = count.get(target, 0) + 1
            if target not in seen:
                seen.add(target)
                stack.append(target)
    return count
