"""One update's memory over its events, as a self-contained page; what the PNG draws, too."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effprof import readers
from effprof.readers import Instant, Span
from effprof.report.plots import COLOURS
from effprof.tape import ROLES
from effprof.units import gib

if TYPE_CHECKING:
    from effprof.estimator.memory import Memory
    from effprof.plan import Plan

_NAMED = 6  # labels that hovering shows


@dataclass(frozen=True)
class Timeline:
    """The update that holds the peak: bytes by role at instants, its phases, reserved memory."""

    title: str
    instants: list[Instant]
    spans: list[Span]
    reserved: int | None
    memory: Memory


def timeline(plan: Plan, memory: Memory) -> Timeline:
    """The timeline of the update in which a plan's memory peaks."""
    tape, blocks, peak = memory.tape, memory.blocks, memory.peak
    every = readers.spans(tape, blocks)
    place = next(i for i, one in enumerate(every) if one.start <= peak.event < one.end)
    first = last = place
    while first and every[first - 1].update == peak.update:
        first -= 1
    while last + 1 < len(every) and every[last + 1].update == peak.update:
        last += 1
    kept = _joined(every[first : last + 1])
    instants = readers.timeline(tape, blocks, kept[0].start, kept[-1].end)
    rank = f", rank {plan.rank}" if plan.rank else ""
    title = (
        f"{plan.model} · {plan.method}{rank} · {plan.micro_batch} × {plan.seq_len} · {plan.dtype}"
        f" · the {peak.update} update"
    )
    return Timeline(title, instants, kept, memory.reserved, memory)


def _joined(every: list[Span]) -> list[Span]:
    """A refresh and an update of each tensor in turn are one phase."""
    found: list[Span] = []
    for span in every:
        last = found[-1] if found else None
        if last is None or {last.phase, span.phase} & {"forward", "backward", "restart"}:
            found.append(span)
            continue
        phase = "update" if last.phase == span.phase == "update" else "refresh, update"
        found[-1] = Span(span.update, phase, last.start, span.end, max(last.peak, span.peak))
    return found


def write_page(path: Path, shown: Timeline) -> None:
    """The timeline as one HTML file, light and dark, no network. Raises EffprofError."""
    from effprof.files import write_whole

    page = files("effprof.report").joinpath("timeline.html").read_text(encoding="utf-8")
    page = page.replace("@TITLE@", html.escape(shown.title))
    page = page.replace("@SUMMARY@", html.escape(_summary(shown)))
    page = page.replace("@DATA@", json.dumps(_data(shown)).replace("</", "<\\/"))
    write_whole(path, page)


def _summary(shown: Timeline) -> str:
    peak, reserved = shown.memory.peak, shown.reserved
    text = f"Peak {gib(peak.size)} allocated in {peak.phase}"
    return text if reserved is None else f"{text}; {gib(reserved)} reserved"


def _data(shown: Timeline) -> dict[str, Any]:
    events = {one.event for one in shown.instants}
    names = _largest(shown, events)
    return {
        "roles": list(ROLES),
        "colours": COLOURS,
        "instants": [
            [one.event, [one.by_role[role] for role in ROLES], names[one.event]]
            for one in shown.instants
        ],
        "spans": [[span.phase, span.start, span.end, span.peak] for span in shown.spans],
        "reserved": shown.reserved,
    }


def _largest(shown: Timeline, events: set[int]) -> dict[int, list[list[Any]]]:
    """The largest groups of storages alive at these events: [bytes, role, label]."""
    tape = shown.memory.tape
    sizes = shown.memory.blocks or {s: change for s, change in tape.events if change > 0}
    keys = [
        next(iter(readers.grouped([(0, role, label)])))
        for role, label in zip(tape.roles, tape.labels, strict=True)
    ]
    alive: dict[tuple[str, str], int] = {}
    found = {}
    for index, (storage, change) in enumerate(tape.events):
        key, size = keys[storage], sizes[storage]
        alive[key] = alive.get(key, 0) + (size if change > 0 else -size)
        if index in events:
            top = sorted(alive.items(), key=lambda item: -item[1])[:_NAMED]
            found[index] = [[size, *key] for key, size in top if size]
    return found
