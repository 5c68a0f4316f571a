"""Tape: the ordered record of a step's memory, and its readers: peak, timeline, phases, diff.

An event is ``(storage, bytes)``: positive when a storage is allocated, negative when it is freed.
Views and in-place operations make none.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

ROLES = ("weights", "gradients", "optimizer", "buffers", "activations", "workspace")
PHASES = ("build", "forward", "backward", "update", "refresh", "restart")
UPDATES = ("build", "first", "steady", "periodic")


@dataclass(slots=True)
class Tape:
    """``roles`` and ``labels`` are per storage.

    ``marks`` say from which event on a phase of an update runs.
    """

    events: list[tuple[int, int]] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    marks: list[tuple[int, str, str]] = field(default_factory=list)

    def mark(self, update: str, phase: str) -> None:
        """From here on events belong to this phase of this kind of update."""
        self.marks.append((len(self.events), update, phase))

    def phase_at(self, event: int) -> tuple[str, str]:
        """The kind of update and the phase an event belongs to."""
        update, phase = "build", "build"
        for start, kind, name in self.marks:
            if start > event:
                break
            update, phase = kind, name
        return update, phase


@dataclass(frozen=True, slots=True)
class Peak:
    """The instant with most bytes alive.

    ``by_role`` sums to ``size``; ``alive`` is (bytes, role, label), largest first.
    """

    size: int
    event: int
    update: str
    phase: str
    by_role: dict[str, int]
    alive: tuple[tuple[int, str, str], ...]


def peak(tape: Tape, blocks: Sequence[int] | None = None, start: int = 0) -> Peak:
    """The peak at or after event ``start``.

    ``blocks`` is each storage's size in the allocator, unsplit tail included.

    Without ``blocks`` a storage counts the bytes requested, as the CPU allocator gives them.
    """
    events = tape.events
    live = most = 0
    at = start
    sizes = _sizes(tape) if blocks is None else blocks
    for index, (storage, change) in enumerate(events):
        if change > 0:
            live += sizes[storage]
            if live > most and index >= start:
                most, at = live, index
        else:
            live -= sizes[storage]
            if index == start and live > most:
                most = live
    alive: set[int] = set()
    for storage, change in events[: at + 1]:
        if change > 0:
            alive.add(storage)
        else:
            alive.discard(storage)
    by_role = dict.fromkeys(ROLES, 0)
    for storage in alive:
        by_role[tape.roles[storage]] += sizes[storage]
    listed = sorted(
        ((sizes[s], tape.roles[s], tape.labels[s]) for s in alive), key=lambda row: -row[0]
    )
    update, phase = tape.phase_at(at)
    return Peak(most, at, update, phase, by_role, tuple(listed))


@dataclass(frozen=True, slots=True)
class Span:
    """A phase of an update: its events, from ``start`` up to ``end``, and its peak in bytes."""

    update: str
    phase: str
    start: int
    end: int
    peak: int


def spans(tape: Tape, blocks: Sequence[int] | None = None) -> list[Span]:
    """Every phase of every update with the most bytes alive in it; empty ones are left out."""
    sizes = _sizes(tape) if blocks is None else blocks
    ends = [start for start, _, _ in tape.marks[1:]] + [len(tape.events)]
    found, live = [], 0
    for (start, update, phase), end in zip(tape.marks, ends, strict=True):
        most = live
        for storage, change in tape.events[start:end]:
            live += sizes[storage] if change > 0 else -sizes[storage]
            most = max(most, live)
        if end > start:
            found.append(Span(update, phase, start, end, most))
    return found


@dataclass(frozen=True, slots=True)
class Instant:
    """Bytes alive after an event, by role."""

    event: int
    by_role: dict[str, int]


def timeline(
    tape: Tape, blocks: Sequence[int] | None, start: int, end: int, points: int = 1500
) -> list[Instant]:
    """Bytes alive by role from event ``start`` up to ``end``: of each of at most ``points`` equal
    pieces the instant with most, so that no peak is lost.
    """
    sizes = _sizes(tape) if blocks is None else blocks
    live = dict.fromkeys(ROLES, 0)
    piece = max(1, -(-(end - start) // points))
    found: list[Instant] = []
    total = most = 0
    best: Instant | None = None
    for index, (storage, change) in enumerate(tape.events[:end]):
        step = sizes[storage] if change > 0 else -sizes[storage]
        live[tape.roles[storage]] += step
        total += step
        if index < start:
            continue
        if best is None or total > most:
            best, most = Instant(index, dict(live)), total
        if (index - start) % piece == piece - 1:
            found.append(best)
            best = None
    return [*found, best] if best is not None else found


_LAYER = re.compile(r"\.\d+(?=\.|$)")
_OWN_INDEX = re.compile(r"^\d+\.")


def grouped(alive: Iterable[tuple[int, str, str]]) -> Counter[tuple[str, str]]:
    """Bytes by role and label, layers taken together: ``model.layers.*.mlp.gate_proj.mm``."""
    found: Counter[tuple[str, str]] = Counter()
    for size, role, label in alive:
        found[role, _OWN_INDEX.sub("", _LAYER.sub(".*", label))] += size
    return found


@dataclass(frozen=True, slots=True)
class Change:
    """What is alive at two peaks under one role and label, in bytes."""

    role: str
    label: str
    before: int
    after: int


def diff(before: Peak, after: Peak) -> list[Change]:
    """What differs between two peaks, the largest difference first."""
    old, new = grouped(before.alive), grouped(after.alive)
    changes = (Change(*key, old[key], new[key]) for key in {**old, **new} if old[key] != new[key])
    return sorted(changes, key=lambda one: (-abs(one.after - one.before), one.role, one.label))


def _sizes(tape: Tape) -> list[int]:
    sizes = [0] * len(tape.roles)
    for storage, change in tape.events:
        if change > 0:
            sizes[storage] = change
    return sizes
