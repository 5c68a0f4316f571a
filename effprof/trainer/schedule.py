"""Learning-rate schedules: linear warmup, then cosine, linear or constant."""

from __future__ import annotations

import math

NAMES = ("cosine", "linear", "constant")
FLOOR = 0.1  # of the peak, where cosine and linear end: the benchmark's min_lr_ratio


def factor(name: str, update: int, warmup: int, total: int) -> float:
    """What multiplies the peak learning rate in ``update`` (0 is the first) of ``total``.

    Warmup reaches 1 at its last update: the first update already learns.
    """
    if update < warmup:
        return (update + 1) / warmup
    if name == "constant":
        return 1.0
    progress = (update - warmup) / max(total - warmup, 1)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if name == "cosine" else 1 - progress
    return FLOOR + (1 - FLOOR) * shape
