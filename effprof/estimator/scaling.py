"""A loss between published runs: a scaling law for the baseline and each method's gap to it.

loss = level + size × N^-a + slope × D^-b for full rank, with N parameters and D tokens in billions
(Hoffmann et al., arXiv 2203.15556, equation 2, whose b is kept: few published series vary D
alone); a method adds a gap of the same form and, where ranks were swept, one per ln(rank / hidden).
What the formula misses at the published sizes is interpolated in ln N: published runs are met.
``scripts/fit_quality.py`` fits the numbers of ``presets/quality.json``.
"""

from __future__ import annotations

import functools
import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from effprof.architectures import PRESETS

BILLION = 1e9
MARGIN = 0.5  # of what more or fewer tokens change, added to the interval: two series measured it


class Exponents(NamedTuple):
    """What all series share: ``slope`` is in nats at one billion tokens."""

    size: float
    tokens: float
    slope: float


class Series(NamedTuple):
    """One method in one lineage.

    ``law`` and ``gap`` are (level, size) in nats, ``rank`` nats per ln(rank / hidden). ``cells``
    hold (parameters, tokens, residual in nats) by size. ``ratios`` bounds rank / hidden, ``fixed``
    is the only rank there is. ``half_width``, ``median`` and ``worst`` are of the leave-one-out
    errors, in nats.
    """

    law: Sequence[float]
    gap: Sequence[float]
    rank: float
    cells: Sequence[Sequence[float]]
    ratios: Sequence[float] | None
    fixed: int | None
    half_width: float
    median: float
    worst: float


@functools.cache
def fitted() -> tuple[Exponents, Mapping[str, Mapping[str, Series]]]:
    """The committed fit: what is shared, and the series by lineage and method."""
    found: dict[str, Any] = json.loads((PRESETS / "quality.json").read_text(encoding="utf-8"))
    series = {
        lineage: {name: Series(**values) for name, values in methods.items()}
        for lineage, methods in found["series"].items()
    }
    return Exponents(**found["exponents"]), series


def features(shared: Exponents, parameters: float) -> tuple[float, float]:
    """What ``law`` and ``gap`` are multiplied with."""
    return 1.0, (parameters / BILLION) ** -shared.size


def of_tokens(shared: Exponents, tokens: float) -> float:
    """The part of the loss that the number of tokens decides, in nats."""
    return float(shared.slope * (tokens / BILLION) ** -shared.tokens)


def formula(
    shared: Exponents, series: Series, parameters: float, tokens: float, ratio: float | None
) -> float:
    """The loss without the residuals, in nats per token."""
    level, size = features(shared, parameters)
    found = (series.law[0] + series.gap[0]) * level + (series.law[1] + series.gap[1]) * size
    found += of_tokens(shared, tokens)
    return found + (series.rank * math.log(ratio) if series.rank and ratio else 0.0)


def loss(
    shared: Exponents, series: Series, parameters: float, tokens: float, ratio: float | None
) -> float:
    """The expected loss in nats per token; ``ratio`` is rank / hidden where there is a rank."""
    found = formula(shared, series, parameters, tokens, ratio)
    return found + _between(series, parameters, 2)


def budget(series: Series, parameters: float) -> float:
    """The tokens of a published run at this size, interpolated in ln N and ln D."""
    return math.exp(_between(series, parameters, 1))


def half_width(shared: Exponents, series: Series, parameters: float, tokens: float) -> float:
    """Half the interval in nats: of leave-one-out errors, more away from the published tokens."""
    usual = of_tokens(shared, budget(series, parameters))
    return series.half_width + MARGIN * abs(of_tokens(shared, tokens) - usual)


def _between(series: Series, parameters: float, column: int) -> float:
    """A column of the cells, linear in ln N between sizes and flat beyond them."""
    sizes = [math.log(cell[0]) for cell in series.cells]
    values = [math.log(cell[1]) if column == 1 else cell[column] for cell in series.cells]
    wanted = math.log(parameters)
    above = bisect_right(sizes, wanted)
    if above in (0, len(sizes)):
        return values[0 if above == 0 else -1]
    low, high = sizes[above - 1], sizes[above]
    share = (wanted - low) / (high - low)
    return values[above - 1] * (1 - share) + values[above] * share
