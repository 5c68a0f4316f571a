"""Which update completes a period."""

from __future__ import annotations


def completes(update: int, period: int) -> bool:
    """Whether that update (0 is the first) completes a multiple of ``period`` updates."""
    return (update + 1) % period == 0


def first_completing(period: int) -> int:
    """The number of the first update, after the first two of a run, that completes a period."""
    return period * -(-3 // period) - 1
