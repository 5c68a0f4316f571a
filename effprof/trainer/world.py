"""Which process this is of a run's, which of them writes, and how they wait for one another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch import distributed as dist

PATIENCE = timedelta(days=1)  # processes wait for one that tokenises or writes alone


@dataclass(frozen=True, slots=True)
class World:
    """One of ``size`` processes; only the one of rank 0 writes files and speaks to people.

    ``host`` is a group of the processes' CPUs, which wait in it for as long as one works alone.
    """

    rank: int = 0
    size: int = 1
    host: Any = None

    @property
    def writes(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            dist.barrier(group=self.host)

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Rank 0 runs what is inside before the others do: it fills caches."""
        if not self.writes:
            self.barrier()
        yield
        if self.writes:
            self.barrier()

    def same(self, value: Any) -> Any:
        """Rank 0's value, on every process."""
        if self.size == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, 0, group=self.host)
        return told[0]

    def most(self, *numbers: float) -> list[float]:
        """The highest of every process, number by number."""
        if self.size == 1:
            return list(numbers)
        import torch

        told = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self.host)
        return [float(one) for one in told.tolist()]
