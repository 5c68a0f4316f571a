"""Tape: the ordered record of a step's memory, and its first reader, the peak (others: readers.py).

An event is ``(storage, bytes)``: positive when a storage is allocated, negative when it is freed.
Views and in-place operations make none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

ROLES = ("weights", "gradients", "optimizer", "buffers", "activations", "workspace")


@dataclass(slots=True)
class Tape:
    """``roles`` and ``labels`` are per storage.

    ``marks`` say from which event on a phase of an update runs; ``streams`` which storages were
    allocated on another CUDA stream than the first.
    """

    events: list[tuple[int, int]] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    marks: list[tuple[int, str, str]] = field(default_factory=list)
    streams: dict[int, int] = field(default_factory=dict)

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
    sizes = sizes_of(tape) if blocks is None else blocks
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


def sizes_of(tape: Tape) -> list[int]:
    """The bytes each storage was allocated with."""
    sizes = [0] * len(tape.roles)
    for storage, change in tape.events:
        if change > 0:
            sizes[storage] = change
    return sizes
