"""DDP's buckets on the tape: where gradients lie on each of several processes.

Every gradient is copied into a bucket as backward forms it and becomes a view of it; buckets live
as long as DDP does. Sources: torch 2.13 torch/csrc/distributed/c10d/reducer.cpp
(mark_variable_ready_dense, rebuild_buckets, compute_bucket_assignment_by_size), reducer.hpp for the
sizes; nn/parallel/distributed.py for the single bucket that is there until the first backward ends.
"""

from __future__ import annotations

from collections.abc import Sequence

from effprof.estimator.autograd import Graph, Leaf, Storage, Value

FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # bytes, beyond which the next bucket begins


class Replicas:
    """The buckets of one process. ``syncing`` is off while gradients only accumulate."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.syncing = True
        self._buckets: list[Value] = []
        self._wanted: list[Leaf] = []
        self._sizes: dict[int, tuple[int, int]] = {}
        self._place: dict[int, Storage] = {}
        self._arrived: list[Leaf] = []
        self._rebuilt = False

    def wrap(self, parameters: Sequence[tuple[Value, Leaf]]) -> None:
        """Make DDP for these parameters, anew where they are others than before."""
        leaves = [leaf for _, leaf in parameters]
        if leaves == self._wanted:
            return
        self._wanted, self._arrived, self._rebuilt = leaves, [], False
        self._sizes = {id(leaf): (value.numel, value.itemsize) for value, leaf in parameters}
        self._fill([leaves] if leaves else [])

    def begin(self) -> None:
        """A forward: after the first reduced backward buckets follow the order of gradients."""
        if not self._rebuilt and len(self._arrived) == len(self._wanted):
            self._rebuilt = True
            self._fill(self._assigned())

    def receive(self, leaf: Leaf) -> None:
        """A gradient is complete: where it is to be reduced it moves into its bucket."""
        if not self.syncing or id(leaf) not in self._place:
            return
        if not self._rebuilt:
            self._arrived.append(leaf)
        leaf.gradient = self.view(leaf)

    def view(self, leaf: Leaf) -> Value | None:
        """A leaf's place in its bucket; None for one that no bucket has."""
        storage = self._place.get(id(leaf))
        return None if storage is None else Value(storage, *self._sizes[id(leaf)])

    def holds(self, leaf: Leaf) -> bool:
        """Whether a leaf's gradient lies in its bucket."""
        return leaf.gradient is not None and leaf.gradient.storage is self._place.get(id(leaf))

    def _assigned(self) -> list[list[Leaf]]:
        found: list[list[Leaf]] = [[]]
        size, limit = 0, FIRST_BUCKET
        for leaf in self._arrived:
            if size >= limit:
                found.append([])
                size, limit = 0, BUCKET
            found[-1].append(leaf)
            numel, itemsize = self._sizes[id(leaf)]
            size += numel * itemsize
        return found

    def _fill(self, buckets: Sequence[Sequence[Leaf]]) -> None:
        """New buckets in place of the old, which are freed first."""
        self._buckets, self._place = [], {}
        outer, self.graph.module = self.graph.module, ""
        for leaves in buckets:
            numel = sum(self._sizes[id(leaf)][0] for leaf in leaves)
            itemsize = self._sizes[id(leaves[0])][1]
            made = self.graph.allocate(numel, itemsize, "ddp_bucket", "gradients")
            self._buckets.append(made)
            self._place |= {id(leaf): made.storage for leaf in leaves}
            for leaf in leaves:
                if leaf.gradient is not None:  # kept as zeros, in the old bucket so far
                    leaf.gradient = self.view(leaf)
        self.graph.module = outer
