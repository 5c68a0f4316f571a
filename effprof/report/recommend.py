"""A recommendation for people: the plan, why, what else there is, what to type."""

from __future__ import annotations

from collections.abc import Sequence

from rich.padding import Padding
from rich.text import Text

from effprof.recommender.choice import Choice
from effprof.recommender.measured import Measured
from effprof.recommender.recommend import Recommendation
from effprof.recommender.words import batch, by_reason, change, command, perplexity, short, title
from effprof.report.terminal import console, table
from effprof.units import GIB, duration, gib, quantity

_LEFT_OUT = 3


def show_recommendation(found: Recommendation) -> None:
    """The answer first, then its reasons, the Pareto set and the commands."""
    out, best = console(), found.best
    space, values = found.space, found.space.values
    several = f"{space.gpus} × " if space.gpus > 1 else ""
    asked = f"{values['model']} on {several}{found.card.title or found.card.name}"
    tokens = f" · {quantity(values['tokens'])} tokens" if values.get("tokens") else ""
    out.print(
        Text(f"{asked} · {space.global_batch} rows per update{tokens} · {found.objective}", "bold")
    )
    if best is not None:
        plan = best.estimate.plan
        out.print(Text(f"→ {title(plan)} at {batch(plan)}", style="bold green"))
    for reason in found.reasons:
        out.print(Padding(reason, (0, 0, 0, 2), expand=False))
    if best is None:
        _show_remedies(found)
    else:
        _show_pareto(found, best)
        if change(found):
            out.print(change(found))
    memory = round(found.limits.memory / (1 - found.limits.margin))
    out.print(
        f"{found.plans:,} plans searched in {found.seconds:.1f} s; of {gib(memory, 1)} "
        f"{100 * found.limits.margin:g} % are kept free (--margin).",
        style="dim",
    )
    reasons = dict[str, list[str]]()
    if found.not_searched:
        why = "no run like this is published; --methods takes them all the same"
        reasons[why] = sorted(found.not_searched)
    reasons |= by_reason(found.candidates.left_out)
    for why, names in list(reasons.items())[:_LEFT_OUT]:
        out.print(f"Left out {', '.join(names)}: {why}", style="dim")
    if best is not None:
        for lead, name in zip(("Next:", "then:"), found.next, strict=False):
            typed = command(best.estimate.plan, name, lineage=best.estimate.lineage)
            out.print(f"{lead} {typed}", soft_wrap=True)


def _show_remedies(found: Recommendation) -> None:
    out = console()
    for one in found.remedies:
        out.print(f"  What would do: {one.flag}, where it takes {gib(one.total, 1)}.")
    if not found.remedies and found.closest is not None:
        out.print(f"  Next: effprof estimate --model {found.space.values['model']}")


def _show_pareto(found: Recommendation, best: Choice) -> None:
    """Plans that no other beats in perplexity, time and memory alike."""
    rows = table("", "method", "batch", "GiB", "spare", "tokens/s", "run", "perplexity")
    rows.columns[1].justify = rows.columns[2].justify = "left"
    for one in _with_best(found.pareto, best):
        plan, time, known = one.estimate.plan, one.estimate.time, one.estimate.quality
        rows.add_row(
            "→" if one.row == best.row else "",
            title(plan),
            short(plan),
            f"{one.total / GIB:.1f}",
            f"{(found.limits.memory - one.total) / GIB:+.1f}",
            "" if time is None else quantity(time.positions / time.update),
            "" if time is None or time.run is None else duration(time.run),
            perplexity(None if known is None else known._asdict()),
        )
    console().print(rows)


def _with_best(pareto: Sequence[Choice], best: Choice) -> list[Choice]:
    rest = [one for one in pareto if one.row != best.row]
    return [best, *rest]


def show_measured(found: Recommendation, result: Measured) -> None:
    """What was probed, in the order that the measurements give."""
    out, places = console(), [one.row for one in _with_best(found.pareto, found.best)]  # type: ignore[arg-type]
    rows = table("plan", "was", "verdict", "process", "estimated", "update", "perplexity")
    for one in result.tried:
        timed = one.result.probe.measured.get("step_seconds")
        known = one.choice.estimate.quality
        rows.add_row(
            title(one.result.plan),
            str(places.index(one.choice.row) + 1),
            one.result.verdict,
            "" if one.result.need is None else gib(one.result.need),
            gib(one.result.estimate.total),
            duration(timed["median"]) if timed else "",
            "unknown" if known is None else f"{known.perplexity:.2f}",
        )
    out.print(rows)
    best = result.best
    if best is None:
        out.print("None of them fits here.")
        return
    out.print(Text(f"→ {title(best.result.plan)} at {batch(best.result.plan)}", "bold green"))
    chosen = best.choice.estimate
    typed = command(chosen.plan, "train", lineage=chosen.lineage)
    out.print(f"Next: {typed}", soft_wrap=True)
