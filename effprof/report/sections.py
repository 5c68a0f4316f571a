"""Parts that pages about different documents have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from effprof.errors import UsageError
from effprof.report.page import Chart, Grid, Section
from effprof.report.subject import Subject
from effprof.report.timeline import timeline
from effprof.tape import ROLES
from effprof.units import duration, gib, quantity

_ABOVE = {"unused in segments": "#c7b9a0", "CUDA context": "#7a6f8f"}


def estimated(plan: Mapping[str, Any]) -> tuple[Any, str]:
    """This version's estimate of a document's plan, or None and why there is none."""
    from effprof.estimator.estimate import estimate
    from effprof.plan import from_dict

    try:
        return estimate(from_dict(dict(plan))), ""
    except UsageError as problem:
        return None, f"The estimated timeline is left out: {problem.message}"


def timelines(subject: Subject) -> tuple[list[Section], list[str]]:
    """The measured timeline where there is one, and the estimate's of the same plan to one scale;
    notes say why one is missing.
    """
    drawn: dict[str, Any] = {}
    measured, notes = subject.document.get("timeline"), []
    if subject.recorded is not None:
        measured = subject.recorded.as_dict()
    if measured:
        drawn["measured"] = measured
    plan = subject.document.get("plan")
    expected, why = estimated(plan) if plan else (None, "")
    if expected is not None:
        drawn["estimated"] = timeline(expected.plan, expected.memory).as_dict()
    elif why:
        notes.append(why)
    top = max((max(sum(one[1]) for one in data["instants"]) for data in drawn.values()), default=0)
    found: list[Section] = [
        Chart(f"Memory over an update, {name}", "timeline", {**data, "top": top}, data["title"])
        for name, data in drawn.items()
    ]
    return found, notes


def headline(plan: Mapping[str, Any]) -> tuple[str, str]:
    rank = f", rank {plan['rank']}" if plan.get("rank") else ""
    parts = [
        f"{plan['micro_batch']} × {plan['seq_len']} positions",
        f"accumulation {plan['grad_accum']}" if plan["grad_accum"] > 1 else "",
        plan["dtype"],
        "checkpointing" if plan["checkpointing"] == "full" else "",
        f"{quantity(plan['tokens'])} tokens" if plan.get("tokens") else "",
        "on the CPU" if plan["device"] == "cpu" else plan.get("gpu") or "",
    ]
    return f"{plan['model']} · {plan['method']}{rank}", " · ".join(part for part in parts if part)


def settings(plan: Mapping[str, Any], title: str = "Every setting") -> Grid:
    rows = []
    for name, value in plan.items():
        if isinstance(value, Mapping):
            rows += [(f"{name}.{key}", str(one)) for key, one in value.items()]
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            rows.append((name, shown))
    return Grid(title, ("setting", "value"), rows, folded=True)


def stack(name: str, memory: Mapping[str, Any]) -> dict[str, Any]:
    """A bar: roles at the peak, and on a GPU what the process holds above them."""
    parts = [[role, memory[role]] for role in ROLES if memory.get(role) is not None]
    reserved, total = memory.get("peak_reserved"), memory.get("process_total", memory.get("total"))
    if reserved is not None and total is not None:
        allocated = sum(size for _, size in parts)
        parts += [["unused in segments", max(reserved - allocated, 0)]]
        parts += [["CUDA context", max(total - reserved, 0)]]
    return {"name": name, "parts": parts}


def bars(title: str, rows: list[dict[str, Any]], note: str = "") -> Chart:
    return Chart(title, "bars", {"rows": rows, "colours": _ABOVE}, note)


def scatter(points: list[dict[str, Any]], x: str, unit: int, **more: Any) -> dict[str, Any]:
    """What report.js draws of points whose x is in bytes or seconds, shown over ``unit``."""
    note = "A disc is published, a square interpolated. Point at one."
    return {"points": points, "x": x, "y": "perplexity", "unit": unit, "note": note, **more}


def peak_tiles(memory: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    tiles = [("peak allocated", gib(memory["peak_allocated"]), "")]
    if memory.get("process_total") is not None:
        tiles.append(("process", gib(memory["process_total"]), ""))
    return [*tiles, ("the peak", f"{memory['peak_phase']}, {memory['peak_update']} update", "")]


def fit_tiles(document: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    if not document["plan"].get("gpu") or not document["fits"]:
        return []
    fit = document["fits"][0]
    spare = gib(abs(fit["headroom"]))
    if fit["fits"]:
        return [(f"fits {fit['gpu']}", f"{spare} to spare", "good")]
    return [(f"does not fit {fit['gpu']}", f"{spare} short", "bad")]


def cards(document: Mapping[str, Any]) -> list[Section]:
    rows = [
        (fit["gpu"], gib(fit["memory"], 1), "yes" if fit["fits"] else "no", gib(fit["headroom"]))
        for fit in document["fits"]
    ]
    return [Grid("Cards", ("card", "memory", "fits", "to spare"), rows)] if rows else []


def error_of(one: Mapping[str, Any]) -> str:
    return "" if one["error"] is None else f"{100 * one['error']:+.2f} %"


def buckets(document: Mapping[str, Any]) -> list[Section]:
    """Estimated beside measured, at the peak and between updates."""
    found: list[Section] = []
    for when, title in (("peak", "At the peak"), ("resident", "Held between updates")):
        rows = []
        for one in document["comparison"]:
            shown = duration if one["bucket"] == "update" else lambda size: gib(round(size))
            if one["when"] == when:
                sizes = shown(one["estimated"]), shown(one["measured"])
                rows.append((one["bucket"].replace("_", " "), *sizes, error_of(one)))
        if rows:
            found.append(Grid(title, ("", "estimated", "measured", "error"), rows))
    return found


def curves(subjects: Sequence[Subject]) -> list[Section]:
    """What changed over the updates, one curve per run."""
    alone = len(subjects) == 1

    def series(key: str, more: str = "") -> list[dict[str, Any]]:
        found = []
        for one in subjects:
            points = [[row["step"], row[key]] for row in one.metrics if row.get(key) is not None]
            last = one.document.get("validation")
            if key == "validation_loss" and last:
                points.append([one.document["steps"], last["loss"]])
            name = (
                (more or key.replace("_", " "))
                if alone
                else f"{one.name}{' ' + more if more else ''}"
            )
            if points:
                found.append({"name": name, "points": thinned(points), "dots": bool(more)})
        return found

    losses = series("loss") + series("validation_loss", "validation")
    charts: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = [
        ("Loss", losses, {"y": "loss, nats per token"}),
        ("Learning rate", series("lr"), {"y": "learning rate", "zero": True}),
        ("Speed", series("tokens_per_second"), {"y": "tokens per second", "zero": True}),
        ("Memory", series("memory_peak"), {"y": "GiB", "unit": "GiB", "zero": True}),
    ]
    return [
        Chart(title, "lines", {"series": found, "x": "update", **how})
        for title, found, how in charts
        if found
    ]


def thinned(points: list[Any], most: int = 800) -> list[Any]:
    """Means over equal pieces, where there are more points than a screen has pixels."""
    piece = -(-len(points) // most)
    if piece == 1:
        return points
    parts = [points[i : i + piece] for i in range(0, len(points), piece)]
    return [[part[-1][0], sum(y for _, y in part) / len(part)] for part in parts]
