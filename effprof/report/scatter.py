"""Memory against perplexity as a PNG: the Pareto front at a glance."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from effprof.files import write_whole
from effprof.published import lineages
from effprof.recommender.compare import Table
from effprof.units import GIB


def points(found: Table) -> list[dict[str, Any]]:
    """What is drawn: GiB, perplexity with its range; plans of unknown perplexity are left out."""
    names = ("method", "rank", "perplexity", "low", "high", "kind", "best", "tokens_per_second")
    rows = [row.as_dict() for row in found.rows]
    return [
        {"gib": row["total"] / GIB, **{name: row[name] for name in names}}
        for row in rows
        if row["perplexity"] is not None
    ]


def _title(found: Table) -> str:
    plan = found.rows[0].plan
    who = f" · {lineages()[found.lineage].title}" if found.lineage else ""
    return f"{plan.model} · {plan.micro_batch} × {plan.seq_len} · {plan.dtype}{who}"


def _label(point: dict[str, Any]) -> str:
    return f"{point['method']} {point['rank'] or ''}".strip()


def draw_scatter(path: Path, found: Table) -> None:
    """The scatter as a PNG. Raises EffprofError where it cannot be written."""
    from matplotlib.figure import Figure

    shown = points(found)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for point in shown:
        colour = "#0072B2" if point["best"] else "#999999"
        below, above = point["perplexity"] - point["low"], point["high"] - point["perplexity"]
        axes.errorbar(
            point["gib"],
            point["perplexity"],
            yerr=[[max(below, 0)], [max(above, 0)]],
            fmt="o" if point["kind"] == "published" else "s",
            color=colour,
            capsize=3,
        )
        axes.annotate(
            _label(point), (point["gib"], point["perplexity"]), (5, 4), textcoords="offset points"
        )
    front = sorted((one["gib"], one["perplexity"]) for one in shown if one["best"])
    if front:
        axes.plot(*zip(*front, strict=True), color="#0072B2", linewidth=1)
    unknown = len(found.rows) - len(shown)
    axes.set(
        xlabel="process, GiB",
        ylabel="perplexity on C4",
        title=_title(found) + (f" · {unknown} unknown" if unknown else ""),
    )
    if shown and max(p["perplexity"] for p in shown) > 2 * min(p["perplexity"] for p in shown):
        axes.set_yscale("log")
        for axis_ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis_ticks("{x:.0f}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_whole(path, buffer.getvalue())
