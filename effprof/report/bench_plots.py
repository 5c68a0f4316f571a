"""Pictures of a comparison: loss curves, memory against perplexity, learning-rate sensitivity."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effprof.bench.results import Line
from effprof.bench.spec import Spec
from effprof.files import write_whole
from effprof.units import MIB

# Okabe and Ito's palette; a second round of it is dashed, a third dotted.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#999999")
_DASHES = ("-", "--", ":", "-.")


def draw(
    folder: Path, spec: Spec, lines: Sequence[Line], rows: Sequence[Mapping[str, Any]]
) -> list[Path]:
    """bench.png with the three pictures; none where no trial came to an end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = [line for line in lines if line.perplexity is not None]
    if not known:
        return []
    figure = Figure(figsize=(16, 6), layout="constrained")
    FigureCanvasAgg(figure)
    curves, pareto, rates = figure.subplots(1, 3)
    styles = {
        arm.label: (_COLOURS[i % len(_COLOURS)], _DASHES[i // len(_COLOURS) % len(_DASHES)])
        for i, arm in enumerate(spec.arms)
    }
    for line in known:
        own = [row for row in rows if row["arm"] == line.arm.label]
        _curve(curves, line, own, styles[line.arm.label])
        _point(pareto, line, styles[line.arm.label][0])
        _rates(rates, line, own, styles[line.arm.label])
    curves.set(xlabel="positions trained on", ylabel="training loss", title="best learning rate")
    curves.legend(fontsize=7, frameon=False)
    pareto.set(xlabel="held between updates, MiB", ylabel="perplexity", title="memory and quality")
    rates.set(xlabel="peak learning rate", ylabel="perplexity", xscale="log", yscale="log")
    rates.set_title("sensitivity (× diverged)")
    for axis in (pareto.yaxis, rates.yaxis):
        axis.set_major_formatter("{x:.0f}")
        axis.set_minor_formatter("{x:.0f}")
    partial = "" if len(rows) >= spec.total else f" · partial: {len(rows)} of {spec.total} trials"
    figure.suptitle(spec.title + partial)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_whole(folder / "bench.png", buffer.getvalue())
    return [folder / "bench.png"]


def _curve(axes: Any, line: Line, own: Sequence[Mapping[str, Any]], style: tuple[str, str]) -> None:
    best = [row for row in own if row["lr"] == line.lr and row["state"] == "done"]
    xs, ys = zip(*best[0]["curve"], strict=True)
    axes.plot(xs, ys, color=style[0], linestyle=style[1], linewidth=1.2, label=line.arm.label)


def _point(axes: Any, line: Line, colour: str) -> None:
    assert line.perplexity is not None
    assert line.held is not None
    at = line.held / MIB, line.perplexity
    spread = [[line.perplexity - (line.low or 0)], [(line.high or 0) - line.perplexity]]
    axes.errorbar(*at, yerr=spread, fmt="o", color=colour, capsize=3)
    axes.annotate(line.arm.label, at, (4, 3), textcoords="offset points", fontsize=7)


def _rates(axes: Any, line: Line, own: Sequence[Mapping[str, Any]], style: tuple[str, str]) -> None:
    tuned = sorted((row["lr"], row["perplexity"]) for row in own if _kept(row))
    xs, ys = [one[0] for one in tuned], [one[1] for one in tuned]
    axes.plot(xs, ys, color=style[0], linestyle=style[1], marker="o", markersize=3, linewidth=1)
    worst = max((y for y in ys if math.isfinite(y)), default=1.0)
    lost = [row["lr"] for row in own if row["state"] == "diverged"]
    axes.plot(lost, [worst] * len(lost), "x", color=style[0])


def _kept(row: Mapping[str, Any]) -> bool:
    return row["state"] == "done" and not row["final"]
