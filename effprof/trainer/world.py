"""Which process this is of a run's, and which of them writes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class World:
    """One of ``size`` processes; only the one of rank 0 writes files and speaks to people."""

    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        return self.rank == 0
