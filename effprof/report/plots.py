"""Pictures of a tape as PNG: matplotlib, without a display."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effprof.tape import ROLES
from effprof.units import GIB, gib

if TYPE_CHECKING:
    from effprof.report.timeline import Timeline

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = {
    "weights": "#0072B2",
    "gradients": "#D55E00",
    "optimizer": "#009E73",
    "buffers": "#999999",
    "activations": "#E69F00",
    "workspace": "#CC79A7",
}
_SHADES = {"forward": "#ffffff", "backward": "#f2f2f2", "update": "#e4e4e4"}


def draw(path: Path, timeline: Timeline) -> None:
    """One update's memory by role as a PNG, phases shaded, the peak and reserved memory marked.

    Raises EffprofError where it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from effprof.files import write_whole

    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    at = [instant.event for instant in timeline.instants]
    layers = [[one.by_role[role] / GIB for one in timeline.instants] for role in ROLES]
    axes.stackplot(at, layers, labels=ROLES, colors=[COLOURS[role] for role in ROLES])
    for span in timeline.spans:
        axes.axvspan(span.start, span.end, color=_SHADES.get(span.phase, "#d8d8d8"), zorder=0)
        axes.axvline(span.start, color="#888888", linewidth=0.6)
        axes.annotate(
            span.phase,
            ((span.start + span.end) / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    if timeline.reserved:
        axes.axhline(timeline.reserved / GIB, color="black", linewidth=0.8, linestyle="--")
        axes.annotate(
            f"reserved {gib(timeline.reserved)}",
            (at[0], timeline.reserved / GIB),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=8,
        )
    peak = max(timeline.instants, key=lambda one: sum(one.by_role.values()))
    top = sum(peak.by_role.values())
    axes.plot([peak.event], [top / GIB], "v", color="black")
    axes.annotate(
        f"peak {gib(top)}", (peak.event, top / GIB), xytext=(6, 2), textcoords="offset points"
    )
    axes.set_xlim(at[0], at[-1])
    axes.set_ylim(0, max(timeline.reserved or 0, top) / GIB * 1.08)
    axes.set_xlabel("allocations and frees, in order")
    axes.set_ylabel("GiB")
    axes.set_title(timeline.title, fontsize=10, pad=18)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, reverse=True)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=140, format="png")
    write_whole(path, picture.getvalue())
