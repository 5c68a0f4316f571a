"""Readers of a tape beside its peak: phases, the timeline, labels taken together, differences.

Apart from ``tape``, which every estimate imports.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from effprof.tape import ROLES, Peak, Tape, sizes_of


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
    sizes = sizes_of(tape) if blocks is None else blocks
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
    sizes = sizes_of(tape) if blocks is None else blocks
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
class Unmatched:
    """Storages of one role and size that one of two peaks has more of; ``count`` is signed (more in
    the second), ``label`` an example from the peak that has them.
    """

    role: str
    size: int
    count: int
    label: str

    @property
    def bytes(self) -> int:
        return self.size * self.count


def unmatched(before: Peak, after: Peak) -> list[Unmatched]:
    """The storages behind a difference between two peaks whose labels do not compare, such as an
    estimated and a recorded one. Those of one size and role cancel out; most bytes come first.
    """
    counts: Counter[tuple[str, int]] = Counter()
    labels: dict[tuple[str, int, bool], str] = {}
    for peak, sign in ((before, -1), (after, 1)):
        for size, role, label in peak.alive:
            counts[role, size] += sign
            labels.setdefault((role, size, sign > 0), label)
    found = [
        Unmatched(role, size, count, labels[role, size, count > 0])
        for (role, size), count in counts.items()
        if count and size
    ]
    return sorted(found, key=lambda one: -abs(one.bytes))


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
