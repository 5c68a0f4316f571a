"""Learning-rate schedules: linear warmup, then cosine, linear, warmup-stable-decay or constant.

What a method multiplies onto them (the recovery after a restart) is the optimizer's.
"""

from __future__ import annotations

import math

NAMES = ("cosine", "linear", "wsd", "constant")
FLOOR = 0.1  # of the peak, where cosine and linear end: the benchmark's min_lr_ratio
DECAY = 0.2  # of the run, at whose end wsd decays linearly (arXiv 2405.18392, section 3)


def factor(name: str, update: int, warmup: int, total: int) -> float:
    """What multiplies the peak learning rate in ``update`` (0 is the first) of ``total``.

    Warmup reaches 1 at its last update: the first update already learns.
    """
    if update < warmup:
        return (update + 1) / warmup
    if name == "constant":
        return 1.0
    progress = (update - warmup) / max(total - warmup, 1)
    if name == "wsd":
        decay = max(round(DECAY * total), 1)
        progress = max(update + 1 - (total - decay), 0) / decay
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if name == "cosine" else 1 - progress
    return FLOOR + (1 - FLOOR) * shape
