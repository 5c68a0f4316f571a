"""Tapes recorded from a real run: the CPU allocator's own record, through torch.profiler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from effprof.tape import Tape

_MARK = "effprof mark"
Names = Mapping[int, tuple[str, str]]  # data pointer -> (role, label)


class CpuRecorder:
    """Records every allocation between ``start`` and ``stop``.

    ``mark`` says that a phase of an update begins; ``name`` gives the storages alive at that moment
    their roles.
    """

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._marks: list[tuple[str, str]] = []
        self._names: list[tuple[int, Names]] = []
        self._outer = ("build", "build")

    def start(self) -> None:
        self._profile.start()
        self.mark("build", "build")

    def stop(self) -> None:
        self._profile.stop()

    def mark(self, update: str, phase: str) -> None:
        """From here on allocations belong to this phase of this kind of update."""
        self._outer = update, phase
        self._mark(update, phase)

    def inner(self, phase: str) -> None:
        """A part of an update begins, or (empty) ends; backward stays backward."""
        update, outer = self._outer
        if outer != "backward":
            self._mark(update, phase or outer)

    def _mark(self, update: str, phase: str) -> None:
        self._marks.append((update, phase))
        with record_function(_MARK):
            pass

    def name(self, names: Names) -> None:
        """Roles and labels of storages alive now, by data pointer."""
        self._names.append((len(self._marks) + 1, names))
        self._mark(*self._marks[-1])

    def tape(self) -> Tape:
        """The record as a tape.

        What forward leaves alive and nobody named is an activation, the rest workspace.
        """
        tape = Tape()
        alive: dict[int, int] = {}
        names = dict(self._names)
        seen = 0
        phase = "build"
        for event in self._events():
            if event is None:
                seen += 1
                if seen in names:
                    _assign(tape, alive, names[seen])
                entered = self._marks[seen - 1]
                if phase == "forward" and entered[1] != "forward":
                    _assign_activations(tape, alive)
                phase = entered[1]
                tape.mark(*entered)
                continue
            pointer, size, operation = event
            if size > 0:
                alive[pointer] = len(tape.roles)
                tape.events.append((len(tape.roles), size))
                tape.roles.append("workspace")
                tape.labels.append(operation)
            elif pointer in alive:
                tape.events.append((alive.pop(pointer), size))
        final = {p: n for _, one in self._names for p, n in one.items() if n[0] != "gradients"}
        _assign(tape, alive, final)
        return tape

    def _events(self) -> Iterator[tuple[int, int, str] | None]:
        """Allocations and frees as (pointer, ± bytes, operation), None at each mark, in time
        order.
        """
        from torch._C._profiler import _EventType

        results: Any = self._profile.profiler
        rows: list[tuple[int, int, tuple[int, int, str] | None]] = []
        stack = [(node, "") for node in results.kineto_results.experimental_event_tree()]
        while stack:
            node, parent = stack.pop()
            if node.tag == _EventType.Allocation:
                fields = node.extra_fields
                rows.append((node.start_time_ns, 1, (fields.ptr, fields.alloc_size, parent)))
            elif node.name == _MARK:
                rows.append((node.start_time_ns, 0, None))
            stack.extend((child, node.name) for child in node.children)
        rows.sort(key=lambda row: row[:2])
        for _, _, event in rows:
            yield event


def _assign(tape: Tape, alive: Mapping[int, int], names: Names) -> None:
    for pointer, (role, label) in names.items():
        if pointer in alive:
            tape.roles[alive[pointer]] = role
            tape.labels[alive[pointer]] = label


def _assign_activations(tape: Tape, alive: Mapping[int, int]) -> None:
    """Everything born in this forward that is alive at its end."""
    starts = [start for start, _, phase in tape.marks if phase == "forward"]
    first = next((i for i, _ in tape.events[starts[-1] :] if i >= 0), None) if starts else None
    if first is None:
        return
    for index in alive.values():
        if index >= first and tape.roles[index] == "workspace":
            tape.roles[index] = "activations"


def pointers(named: Mapping[str, torch.Tensor], role: str) -> dict[int, tuple[str, str]]:
    """Names for ``CpuRecorder.name``: each tensor's storage with its role."""
    return {
        tensor.untyped_storage().data_ptr(): (role, name)
        for name, tensor in named.items()
        if tensor.device.type == "cpu"
    }
