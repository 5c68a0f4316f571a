"""Fit presets/quality.json from presets/published.csv and print the leave-one-out errors.

python scripts/fit_quality.py            fits, prints the table, writes the file
python scripts/fit_quality.py --check    fits and prints; fails where the committed file differs

What is fitted, with the formula of effprof/estimator/scaling.py:
- the token slope, from series of one table that differ in tokens alone;
- the exponent of the size, one for all series, where the leave-one-out errors are least;
- per lineage the baseline's law, and per method its gap to that law.
A series needs four sizes; one whose worst leave-one-out error is above 10 % of perplexity is not
kept: its runs say too little about sizes in between. An error leaves out a size with all its ranks.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import defaultdict
from typing import Any, NamedTuple

from effprof import published, registry
from effprof.architectures import PRESETS, architecture, presets
from effprof.estimator.scaling import (
    BILLION,
    Exponents,
    Series,
    features,
    formula,
    loss,
    of_tokens,
)

TOKENS_EXPONENT = 0.28  # Hoffmann et al., arXiv 2203.15556, equation 10: 0.2849 before rounding
SIZES_NEEDED = 4
WORST = math.log(1.10)  # nats: 10 % of perplexity
COVERED = 0.9
GRID = [round(0.30 + 0.01 * step, 2) for step in range(41)]


class Cell(NamedTuple):
    """One published run: its model's parameters, tokens, rank / hidden or None, loss in nats."""

    parameters: int
    tokens: float
    rank: int | None
    ratio: float | None
    loss: float


Table = dict[str, dict[str, list[Cell]]]


def usable(one: published.Published) -> bool:
    """Whether a row is a finished run that a plan at its defaults can be."""
    known = one.method and one.perplexity and one.tokens and one.seq_len and one.model in presets()
    odd = one.settings or one.differs or one.remark
    return bool(known) and not odd and one.dataset == "C4"


def cells() -> Table:
    """Runs by lineage and method: per size, rank and tokens the first row of the table."""
    found: dict[tuple[str, str, str, str], Cell] = {}
    for one in published.everything():
        if not usable(one):
            continue
        assert one.perplexity
        shape = architecture(one.model)
        rank = int(one.rank) if one.rank else None
        ratio = rank / shape.hidden if rank else None
        run = Cell(
            shape.parameters, float(one.tokens) * BILLION, rank, ratio, math.log(one.perplexity)
        )
        found.setdefault((one.lineage, one.method, one.model, one.rank), run)
    table: Table = defaultdict(lambda: defaultdict(list))
    for (lineage, method, _, _), run in found.items():
        table[lineage][method].append(run)
    for methods in table.values():
        for runs in methods.values():
            runs.sort()
    return table


def token_slope() -> tuple[float, list[float]]:
    """Nats at a billion tokens: the mean over runs that differ in tokens alone, and each."""
    groups: dict[tuple[str, ...], list[tuple[float, float]]] = defaultdict(list)
    for one in published.everything():
        if one.perplexity and one.tokens and one.method and not one.remark:
            key = (one.source, one.table, one.method, one.model, one.rank, one.settings)
            groups[key].append((float(one.tokens), math.log(one.perplexity)))
    slopes = []
    for runs in groups.values():
        first, last = min(runs), max(runs)
        if last[0] > first[0]:
            change = first[0] ** -TOKENS_EXPONENT - last[0] ** -TOKENS_EXPONENT
            slopes.append((first[1] - last[1]) / change)
    return statistics.mean(slopes), slopes


def series_of(shared: Exponents, runs: list[Cell], law: tuple[float, float] | None) -> Series:
    """The least-squares fit of one series: the baseline's law, or with one given, a gap to it."""
    import numpy as np

    rows, wanted = [], []
    swept = any(a.parameters == b.parameters and a.ratio != b.ratio for a in runs for b in runs)
    for run in runs:
        of_size = features(shared, run.parameters)
        rows.append([*of_size, math.log(run.ratio)] if swept and run.ratio else list(of_size))
        known = of_tokens(shared, run.tokens)
        known += 0.0 if law is None else law[0] * of_size[0] + law[1] * of_size[1]
        wanted.append(run.loss - known)
    found, *_ = np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=None)
    if swept and found[2] > 0:  # a larger rank is never worse: what says so is noise
        found, *_ = np.linalg.lstsq(np.array(rows)[:, :2], np.array(wanted), rcond=None)
        swept = False
    pair = (round(float(found[0]), 6), round(float(found[1]), 6))
    ratios = sorted(run.ratio for run in runs if run.ratio)
    ranks = {run.rank for run in runs}
    fixed = ranks.pop() if len(ranks) == 1 else None
    made = Series(
        law=pair if law is None else law,
        gap=(0.0, 0.0) if law is None else pair,
        rank=round(float(found[2]), 6) if swept else 0.0,
        cells=(),
        ratios=(round(ratios[0], 6), round(ratios[-1], 6)) if ratios and not fixed else None,
        fixed=fixed,
        half_width=0.0,
        median=0.0,
        worst=0.0,
    )
    return made._replace(cells=anchored(shared, made, runs))


def anchored(shared: Exponents, made: Series, runs: list[Cell]) -> list[tuple[int, int, float]]:
    """Per size its parameters, tokens, and what the formula misses there, mean over ranks."""
    by_size: dict[int, list[Cell]] = defaultdict(list)
    for run in runs:
        by_size[run.parameters].append(run)
    found = []
    for parameters, group in sorted(by_size.items()):
        missed = [
            run.loss - formula(shared, made, parameters, run.tokens, run.ratio) for run in group
        ]
        found.append((parameters, round(group[0].tokens), round(statistics.mean(missed), 6)))
    return found


def left_out(shared: Exponents, runs: list[Cell], law: tuple[float, float] | None) -> list[float]:
    """Each run's error in nats, predicted from the other sizes of its series."""
    errors = []
    for run in runs:
        others = [one for one in runs if one.parameters != run.parameters]
        fit = series_of(shared, others, law)
        errors.append(run.loss - loss(shared, fit, run.parameters, run.tokens, run.ratio))
    return errors


def fit_all(shared: Exponents, table: Table) -> dict[tuple[str, str], tuple[Series, list[float]]]:
    """Every series of enough sizes, with its leave-one-out errors."""
    baseline = registry.default()
    found = {}
    for lineage, methods in table.items():
        if len({run.parameters for run in methods.get(baseline, [])}) < SIZES_NEEDED:
            continue
        base = series_of(shared, methods[baseline], None)
        law = (base.law[0], base.law[1])
        for method, runs in methods.items():
            if len({run.parameters for run in runs}) >= SIZES_NEEDED:
                own = None if method == baseline else law
                fit = series_of(shared, runs, own)
                found[lineage, method] = (fit, left_out(shared, runs, own))
    return found


def kept(errors: list[float]) -> bool:
    return max(map(abs, errors)) <= WORST


def exponent(slope: float, table: Table) -> float:
    """The exponent of the size with the least mean leave-one-out error, each capped at WORST."""

    def cost(candidate: float) -> float:
        shared = Exponents(candidate, TOKENS_EXPONENT, slope)
        found = fit_all(shared, table).values()
        return statistics.mean(min(abs(e), WORST) for _, errors in found for e in errors)

    return min(GRID, key=cost)


def quantile(errors: list[float]) -> float:
    """The conformal quantile: a further error is below it with probability COVERED."""
    ordered = sorted(map(abs, errors))
    return ordered[min(math.ceil(COVERED * (len(ordered) + 1)), len(ordered)) - 1]


def covered(errors: list[float], pool: list[float]) -> int:
    """How many errors lie within the interval that the rest of their lineage's errors give."""
    inside = 0
    for error in errors:
        others = list(pool)
        others.remove(error)
        inside += abs(error) <= quantile(others)
    return inside


def main() -> dict[str, Any]:
    """The content of quality.json, and the table on stdout."""
    table, (slope, slopes) = cells(), token_slope()
    slope = round(slope, 6)
    shared = Exponents(exponent(slope, table), TOKENS_EXPONENT, slope)
    found = fit_all(shared, table)
    pools: dict[str, list[float]] = defaultdict(list)
    for (lineage, _), (_, errors) in found.items():
        if kept(errors):
            pools[lineage] += errors
    each = ", ".join(f"{one:.3f}" for one in slopes)
    print(f"exponent of the size {shared.size}; token slope {slope:.3f} (from {each})")
    print(f"{'lineage':9} {'method':12} {'n':>2} {'median %':>9} {'worst %':>8} {'covered':>8}")
    result: dict[str, Any] = {"exponents": shared._asdict(), "series": {}, "covered": 0.0}
    all_inside = 0
    for (lineage, method), (fit, errors) in sorted(found.items()):
        sizes = sorted(abs(math.expm1(error)) for error in errors)
        median, worst = statistics.median(sizes), sizes[-1]
        line = f"{lineage:9} {method:12} {len(errors):2} {100 * median:9.1f} {100 * worst:8.1f}"
        if not kept(errors):
            print(f"{line}  not kept")
            continue
        pool = pools[lineage]
        inside = covered(errors, pool)
        all_inside += inside
        print(f"{line} {inside:>4} of {len(errors)}")
        fit = fit._replace(
            half_width=round(quantile(pool), 6),
            median=round(statistics.median(map(abs, errors)), 6),
            worst=round(max(map(abs, errors)), 6),
        )
        result["series"].setdefault(lineage, {})[method] = fit._asdict()
    everything = [error for pool in pools.values() for error in pool]
    percent = sorted(100 * abs(math.expm1(error)) for error in everything)
    widths = ", ".join(f"{key} ±{100 * math.expm1(quantile(p)):.1f} %" for key, p in pools.items())
    print(
        f"all kept: n {len(percent)}, median {statistics.median(percent):.1f} %, worst "
        f"{percent[-1]:.1f} %, {all_inside} inside their interval; {widths}"
    )
    result["covered"] = all_inside / len(percent)
    return result


def text(result: dict[str, Any]) -> str:
    """The file's content: a line per series."""
    lineages = []
    for lineage, methods in result["series"].items():
        lines = [f"   {json.dumps(name)}: {json.dumps(one)}" for name, one in methods.items()]
        lineages.append(f"  {json.dumps(lineage)}: {{\n" + ",\n".join(lines) + "\n  }")
    series = ",\n".join(lineages)
    exponents = json.dumps(result["exponents"])
    return f'{{\n "exponents": {exponents},\n "series": {{\n{series}\n }}\n}}\n'


if __name__ == "__main__":
    written = text(main())
    path = PRESETS / "quality.json"
    if sys.argv[1:] == ["--check"]:
        sys.exit(f"{path.name} is not this fit" if path.read_text() != written else 0)
    path.write_text(written, encoding="utf-8")
