"""Candidates that differ in rank alone: between three ranks every size is a parabola."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from effprof.recommender.instants import Held, Numbers, Sizes


@dataclass(frozen=True, slots=True)
class Kept:
    """What several candidates hold between micro-steps, and the most that an update takes above
    it: by candidate × allocator. ``seconds`` are each one's update's.
    """

    resident: Numbers
    gradients: Numbers
    transient: Numbers
    in_backward: Mapping[str, Numbers]
    seconds: Numbers


def kept(found: Sequence[Held], weights: Numbers) -> Kept:
    """Candidates as weighted sums (candidate × found) of what was counted."""

    def mix(parts: Sequence[Sizes]) -> Numbers:
        mixed: Numbers = np.tensordot(weights, np.stack(parts), axes=1)
        return mixed

    return Kept(
        mix([one.resident for one in found]),
        mix([one.gradients for one in found]),
        mix([one.transient for one in found]).max(-1),
        {
            name: mix([one.in_backward[name] for one in found]).max(-1)
            for name in found[0].in_backward
        },
        weights @ np.array([one.seconds for one in found]),
    )


def together(parts: Sequence[Kept]) -> Kept:
    """Candidates counted one by one."""

    def joined(name: str) -> Numbers:
        return np.concatenate([getattr(one, name) for one in parts])

    return Kept(
        joined("resident"),
        joined("gradients"),
        joined("transient"),
        {
            name: np.concatenate([one.in_backward[name] for one in parts])
            for name in parts[0].in_backward
        },
        joined("seconds"),
    )


def alike(found: Sequence[Held]) -> bool:
    """Whether their updates have the same events: 8-bit states of few numbers do not."""
    return len({(one.transient.shape, *_shapes(one)) for one in found}) == 1


def _shapes(one: Held) -> list[tuple[int, ...]]:
    return [part.shape for part in one.in_backward.values()]


def weights(nodes: Sequence[int], ranks: Sequence[int]) -> Numbers:
    """Lagrange's, by rank × node."""
    at, own = np.array(ranks, np.float64)[:, None], np.array(nodes, np.float64)
    columns = []
    for number, node in enumerate(own):
        others = np.delete(own, number)
        columns.append(np.prod((at - others) / (node - others), axis=1))
    return np.stack(columns, axis=1)
