"""Methods side by side, for people."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from effprof import registry
from effprof.published import lineages
from effprof.recommender.compare import Row, Table
from effprof.recommender.words import command, perplexity
from effprof.report.terminal import console, table
from effprof.units import GIB, quantity

_LEFT_OUT = 6
_WIDE = 94  # what every column takes


def show_comparison(found: Table) -> None:
    """One line per plan: GiB by role at the peak, what the process needs, time, perplexity."""
    out, plan = console(), found.rows[0].plan
    title = f"{plan.model} · {plan.micro_batch} × {plan.seq_len} positions · {plan.dtype}"
    if plan.gpu:
        title += f" · {found.rows[0].estimate.fits[0].gpu.title}"
    out.print(Text(title, style="bold"))
    timed = any(row.estimate.time for row in found.rows)
    names = ["method", "rank", "weights", "optim", "other", "total"]
    names += ["spare"] if plan.gpu else []
    names += ["tokens/s"] if timed else []
    names += ["perplexity", "vs full"]
    narrow = out.width < _WIDE and len(names) > 8
    shown = [i for i, name in enumerate(names) if not (narrow and name in ("other", "vs full"))]
    rows = table(*(names[i] for i in shown))
    full = next((row for row in found.rows if row.plan.method == registry.default()), None)
    for row in found.rows:
        cells = _cells(row, full, timed=timed)
        rows.add_row(*(cells[i] for i in shown))
    out.print(rows)
    other = "" if narrow else "other is gradients, activations, workspace; "
    note = f"Sizes in GiB at each plan's own peak; {other}total the process."
    out.print(note, style="dim")
    if narrow:
        out.print(f"Two columns are left out below {_WIDE} characters.", style="dim")
    if found.lineage:
        out.print(
            f"Perplexities are of one group of papers, {lineages()[found.lineage].title}; ~ is "
            f"interpolated. * is on the Pareto front of total against perplexity.",
            style="dim",
        )
    for label, why in list(found.left_out.items())[:_LEFT_OUT]:
        out.print(f"Left out {label}: {why}", style="dim")
    if len(found.left_out) > _LEFT_OUT:
        out.print(f"and {len(found.left_out) - _LEFT_OUT} more (--json names them)", style="dim")
    typed = command(found.rows[0].plan, "estimate")
    out.print(f"Next: {typed} shows one of them in full.", soft_wrap=True)


def _cells(row: Row, full: Row | None, *, timed: bool) -> list[str]:
    values: dict[str, Any] = row.as_dict()

    def size(*names: str) -> str:
        return f"{sum(values[name] for name in names) / GIB:.2f}"

    cells = [f"{values['method']}{' *' if row.best else ''}", str(values["rank"] or "")]
    cells += [size("weights"), size("optimizer")]
    cells += [size("gradients", "activations", "workspace", "buffers"), size("total")]
    if row.plan.gpu:
        headroom = values["headroom"]
        cells.append("" if headroom is None else f"{headroom / GIB:+.2f}")
    if timed:
        rate = values["tokens_per_second"]
        cells.append("" if rate is None else quantity(rate))
    cells.append(perplexity(values))
    if full is None or full is row:
        cells.append("")
    else:
        share = row.estimate.total / full.estimate.total - 1
        cells.append(f"{100 * share:+.0f} %")
    return cells
