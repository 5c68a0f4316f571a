"""Memory over a tape's events: what the PNG, the page and the JSON document show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from effprof import readers
from effprof.readers import Instant, Span
from effprof.tape import ROLES, Tape, sizes_of

if TYPE_CHECKING:
    from effprof.estimator.memory import Memory
    from effprof.plan import Plan
    from effprof.prober.records import Probe

_NAMED = 6  # groups of storages that hovering shows
_POINTS = 600


@dataclass(frozen=True)
class Timeline:
    """Bytes by role at instants, the phases they lie in, and reserved memory where it is known."""

    title: str
    instants: list[Instant]
    spans: list[Span]
    reserved: int | None
    tape: Tape
    blocks: Sequence[int] | None

    def as_dict(self) -> dict[str, Any]:
        """The JSON object: bytes; ``instants`` are [event, bytes by role in order, largest], the
        largest groups of storages then alive as [bytes, index into ``labels``].
        """
        labels: dict[tuple[str, str], int] = {}
        named = _largest(self, labels)
        return {
            "title": self.title,
            "roles": list(ROLES),
            "instants": [
                [one.event, [one.by_role[role] for role in ROLES], named[one.event]]
                for one in self.instants
            ],
            "labels": [list(key) for key in labels],
            "spans": [[span.phase, span.start, span.end, span.peak] for span in self.spans],
            "reserved": self.reserved,
        }


def timeline(plan: Plan, memory: Memory) -> Timeline:
    """The timeline of the update in which a plan's memory peaks."""
    tape, blocks, peak = memory.tape, memory.blocks, memory.peak
    every = readers.spans(tape, blocks)
    place = next(i for i, one in enumerate(every) if one.start <= peak.event < one.end)
    first = last = place
    while first and not _begins(every, first) and every[first - 1].update == peak.update:
        first -= 1
    while last + 1 < len(every) and not _begins(every, last + 1):
        if every[last + 1].update != peak.update:
            break
        last += 1
    kept = _joined(every[first : last + 1])
    instants = readers.timeline(tape, blocks, kept[0].start, kept[-1].end, _POINTS)
    rank = f", rank {plan.rank}" if plan.rank else ""
    title = (
        f"{plan.model} · {plan.method}{rank} · {plan.micro_batch} × {plan.seq_len} · {plan.dtype}"
        f" · the {peak.update} update"
    )
    return Timeline(title, instants, kept, memory.reserved, tape, blocks)


def recorded(probe: Probe) -> Timeline | None:
    """The timeline of what a probe recorded; None where it recorded none."""
    from effprof.estimator.memory import measure
    from effprof.prober.compare import card_of

    if probe.tape is None or not probe.tape.events or not probe.tape.marks:
        return None
    card = card_of(probe)
    return timeline(probe.plan, measure(probe.plan, probe.tape, *([card] if card else [])))


def whole(tape: Tape, title: str) -> Timeline:
    """The timeline of everything on a tape of another program, which tells no phases."""
    instants = readers.timeline(tape, None, 0, len(tape.events), _POINTS)
    return Timeline(title, instants, [], None, tape, None)


def _begins(every: list[Span], place: int) -> bool:
    """Whether an update begins with this span: a recording has several of a kind in a row."""
    after = place and every[place - 1].phase not in ("forward", "backward")
    return bool(after) and every[place].phase == "forward"


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


def _largest(shown: Timeline, labels: dict[tuple[str, str], int]) -> dict[int, list[list[int]]]:
    """The largest groups of storages alive at each instant: [bytes, index of (role, label)]."""
    tape = shown.tape
    sizes = sizes_of(tape) if shown.blocks is None else shown.blocks
    events = {one.event for one in shown.instants}
    keys = [
        next(iter(readers.grouped([(0, role, label)])))
        for role, label in zip(tape.roles, tape.labels, strict=True)
    ]
    alive: dict[tuple[str, str], int] = {}
    found: dict[int, list[list[int]]] = {}
    for index, (storage, change) in enumerate(tape.events):
        key, size = keys[storage], sizes[storage]
        alive[key] = alive.get(key, 0) + (size if change > 0 else -size)
        if index in events:
            top = sorted(alive.items(), key=lambda item: -item[1])[:_NAMED]
            found[index] = [
                [held, labels.setdefault(key, len(labels))] for key, held in top if held
            ]
    return found
