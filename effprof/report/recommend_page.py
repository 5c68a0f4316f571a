"""The page of a recommendation: the plan, why, what no other beats, what to type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from effprof.recommender.words import by_reason, perplexity
from effprof.report.page import Chart, Grid, Page, Prose, Section
from effprof.report.sections import bars, error_of, scatter, settings, stack
from effprof.report.subject import Subject
from effprof.units import GIB, duration, gib, quantity

Row = Mapping[str, Any]
_SPANS = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))


def page(subject: Subject) -> Page:
    """The pick first; where nothing fits, what would."""
    document = subject.document
    best = document["best"]
    shown = best or document["closest"]
    plan = shown["plan"]
    tokens = f"{quantity(plan['tokens'])} tokens" if plan.get("tokens") else ""
    parts = [
        "recommendation",
        f"{plan['model']} on {document['gpu'] or 'a card of that memory'}",
        f"{document['global_batch']} rows per update",
        tokens,
        f"by {document['objective']}",
    ]
    subtitle = " · ".join(part for part in parts if part)
    sections: list[Section] = [Prose("Why", document["reasons"])]
    if best:
        title = f"{best['title']} at {best['batch']}"
        sections.append(Prose("What to type", list(document["commands"].values()), typed=True))
        sections += _measured(document)
        sections.append(_limits(document, best))
        sections += _pictures(document, best)
        sections.append(_pareto(document, best))
        if document["change"]:
            sections.append(Prose("What would change the answer", [document["change"]]))
    else:
        title = f"{plan['model']}: nothing keeps the limits"
        if document["remedies"]:
            rows = [(one["flag"], gib(one["total"])) for one in document["remedies"]]
            sections.append(Grid("What would do", ("with", "takes"), rows))
        sections.append(_limits(document, shown))
    sections.append(_bars(document, shown))
    sections.append(settings(plan))
    return Page(title, subtitle, _tiles(document, shown), sections, _notes(document))


def _tiles(document: Row, shown: Row) -> list[tuple[str, str, str]]:
    spare = shown["headroom"]
    if spare >= 0:
        tiles = [("fits", f"{gib(spare)} to spare", "good")]
    else:
        tiles = [("the smallest plan", f"{gib(-spare)} too large", "bad")]
    tiles.append(("process", gib(shown["total"]), ""))
    if shown["perplexity"] is not None:
        tiles.append((f"perplexity, {shown['kind']}", perplexity(shown), ""))
    if shown["update_seconds"]:
        tiles.append(("update", duration(shown["update_seconds"]), ""))
        tiles.append(("tokens per second", quantity(shown["tokens_per_second"]), ""))
    if shown["run_seconds"]:
        tiles.append(("the run", duration(shown["run_seconds"]), ""))
    return tiles


def _limits(document: Row, shown: Row) -> Grid:
    """What was asked for beside what the plan takes."""
    limits = document["limits"]
    hours = None if shown["run_seconds"] is None else shown["run_seconds"] / 3600
    asked = (
        ("memory of the process", limits["memory"], shown["total"], gib),
        ("hours", limits["hours"], hours, _plain),
        ("tokens per second, at least", limits["tokens_per_second"], shown["tokens_per_second"],
         _plain),
        ("perplexity, at most", limits["perplexity"], shown["perplexity"], _plain),
    )  # fmt: skip
    rows = [
        (name, show(limit), "unknown" if own is None else show(own))
        for name, limit, own, show in asked
        if limit is not None
    ]
    note = f"Of the memory {100 * limits['margin']:g} % is kept free and already taken off."
    head = ("limit", "asked for", "this plan" if shown["fits"] else "the smallest plan")
    return Grid("Limits", head, rows, note)


def _plain(value: float) -> str:
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _pictures(document: Row, best: Row) -> list[Section]:
    """Perplexity, or where none is known speed, over memory and over time."""
    rows = _every(document, best)
    key = "perplexity" if any(row["perplexity"] is not None for row in rows) else "update_seconds"
    kept = [row for row in rows if row[key] is not None]
    if len(kept) < 2:
        return []
    points = [
        {
            "name": row["title"] + ("" if row["headroom"] >= 0 else " (does not fit)"),
            "x": row["total"],
            "y": row[key],
            "low": row["low"] if key == "perplexity" else row[key],
            "high": row["high"] if key == "perplexity" else row[key],
            "best": row is kept[0],
            "exact": key != "perplexity" or row["kind"] == "published",
            "size": row["run_seconds"] or row["update_seconds"],
            "text": _told(row),
        }
        for row in kept
    ]
    words = {"y": key.replace("_", " "), "best": "the pick"}
    words["rest"] = "the rest of the Pareto set, full rank, what lacks least"
    memory = scatter(points, "memory of the process, GiB", GIB, **words)
    memory |= {"limit": document["limits"]["memory"], "limited": "the limit"}
    note = "A larger mark takes longer; beyond the dashed line it does not fit."
    if len(kept) < len(rows):
        note += f" {len(rows) - len(kept)} of unknown {words['y']} are in the table alone."
    found: list[Section] = [Chart("Perplexity, memory and time", "scatter", memory, note)]
    timed = [(one, row) for one, row in zip(points, kept, strict=True) if one["size"]]
    if key == "perplexity" and len(timed) > 1:
        unit, seconds = next(
            pair for pair in _SPANS if timed[0][0]["size"] >= pair[1] or pair[1] == 1
        )
        whole = "of the run" if best["run_seconds"] else "of an update"
        over = [{**one, "x": one["size"], "size": row["total"]} for one, row in timed]
        data = scatter(over, f"time {whole}, {unit}", seconds, **words)
        found.append(
            Chart("Perplexity over time", "scatter", data, "A larger mark takes more memory.")
        )
    return found


def _every(document: Row, best: Row) -> list[Row]:
    """The pick, the rest of the Pareto set, and the two it is held against."""
    found: dict[str, Row] = {}
    for row in (best, *document["pareto"], document["full"], document["nearest"]):
        if row is not None:
            found.setdefault(row["title"] + row["batch"], row)
    return list(found.values())


def _told(row: Row) -> str:
    known = row["perplexity"] is not None
    parts = [
        f"{row['title']} at {row['batch']}: {gib(row['total'])}"
        + (" (does not fit)" if row["headroom"] < 0 else ""),
        f"perplexity {perplexity(row)}{' ' + row['kind'] if known else ''}",
        f"{duration(row['update_seconds'])} an update" if row["update_seconds"] else "",
        f"{duration(row['run_seconds'])} for the run" if row["run_seconds"] else "",
    ]
    return ", ".join(part for part in parts if part)


def _pareto(document: Row, best: Row) -> Grid:
    rest = [row for row in document["pareto"] if row["plan"] != best["plan"]]
    rows: Sequence[Row] = [best, *rest]
    costs = any(row["run_cost"] is not None for row in rows)
    shown = [
        (
            f"{'→ ' if row is best else ''}{row['title']}",
            perplexity(row),
            gib(row["total"]),
            gib(row["headroom"]),
            quantity(row["tokens_per_second"]) if row["tokens_per_second"] else "unknown",
            duration(row["run_seconds"]) if row["run_seconds"] else "",
            *([f"{row['run_cost'] or 0:,.2f}"] if costs else []),
            row["batch"],
        )
        for row in rows
    ]
    money = ["cost"] if costs else []
    head = ("plan", "perplexity", "process", "to spare", "tokens/s", "run", *money, "batch")
    note = "Plans that no other beats in perplexity, time and memory alike; → is the pick."
    return Grid("The Pareto set", head, shown, note)


def _bars(document: Row, shown: Row) -> Chart:
    """The memory of the pick beside the plans it is held against."""
    named = [shown, document["full"], document["nearest"]]
    kept = {row["title"]: row for row in named if row is not None}
    stacks = [stack(name, row) for name, row in kept.items()]
    return bars("Memory of the process", stacks, "By role at each plan's own peak.")


def _measured(document: Row) -> list[Section]:
    if not document.get("measured"):
        return []
    rows = []
    for one in document["measured"]["results"]:
        plan, timed = one["plan"], one["measured"].get("step_seconds")
        peak = next((b for b in one["comparison"] if b["bucket"] == "peak_allocated"), None)
        rows.append(
            (
                f"{plan['method']} {plan['rank'] or ''} × {plan['micro_batch']}",
                one["verdict"],
                "" if one["need"] is None else gib(one["need"]),
                error_of(peak) if peak else "",
                duration(timed["median"]) if timed else "",
            )
        )
    head = ("plan", "verdict", "process, measured", "peak allocated, estimate", "update, measured")
    return [Grid("Measured here", head, rows, "In the order that the measurements give.")]


def _notes(document: Row) -> list[str]:
    searched = document["searched"]
    notes = [f"{searched['plans']:,} plans searched in {searched['seconds']:.1f} s."]
    if document["not_searched"]:
        names = ", ".join(document["not_searched"])
        notes.append(f"Left out, for no run like this is published of them: {names}.")
    why = by_reason(document["left_out"])
    return [*notes, *(f"Left out {', '.join(names)}: {one}." for one, names in why.items())]
