"""Tapes recorded from a real run: the CPU allocator's record and the CUDA allocator's history."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from effprof.tape import Tape

_MARK = "effprof mark"
_FREED = "free_completed"
_KEPT = 4_000_000  # entries of CUDA's history; four updates at 7b make some hundred thousand
_APART = 2e-5
Names = Mapping[int, tuple[str, str]]  # data pointer -> (role, label)
Event = tuple[int, int, str]  # data pointer, ± bytes, operation


class Recorder(ABC):
    """Records every allocation between ``start`` and ``stop``.

    ``mark`` says that a phase of an update begins; ``name`` gives the storages alive at that moment
    their roles.
    """

    def __init__(self) -> None:
        self._marks: list[tuple[str, str]] = []
        self._names: list[tuple[int, Names]] = []
        self._outer = ("build", "build")
        self.incomplete = ""  # why the record is not whole

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def stop(self) -> None: ...

    @abstractmethod
    def _here(self) -> None:
        """Leave a sign of this moment in the record."""

    @abstractmethod
    def _events(self) -> Iterator[Event | None]:
        """Allocations and frees in time order, None at each sign that ``_here`` left."""

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
        self._here()

    def name(self, names: Names) -> None:
        """Roles and labels of storages alive now, by data pointer."""
        self._names.append((len(self._marks) + 1, names))
        self._mark(*self._marks[-1])

    def tape(self) -> Tape:
        """The record as a tape.

        What forward leaves alive and nobody named is an activation, the rest workspace.
        """
        return _assembled(self._events(), self._marks, self._names)


class CpuRecorder(Recorder):
    """The CPU allocator's own record, through torch.profiler."""

    def __init__(self) -> None:
        super().__init__()
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def start(self) -> None:
        self._profile.start()
        self.mark("build", "build")

    def stop(self) -> None:
        self._profile.stop()

    def _here(self) -> None:
        with record_function(_MARK):
            pass

    def _events(self) -> Iterator[Event | None]:
        from torch._C._profiler import _EventType

        results: Any = self._profile.profiler
        rows: list[tuple[int, int, Event | None]] = []
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


class CudaRecorder(Recorder):
    """The CUDA allocator's history (torch.cuda.memory), from before the first allocation.

    ``labelled`` records Python's frames, which name an allocation and cost some 2 µs each.
    """

    def __init__(self, device: torch.device, *, labelled: bool = False) -> None:
        super().__init__()
        self._device, self._labelled = device, labelled
        self._times: list[float] = []
        self._trace: list[dict[str, Any]] = []

    def start(self) -> None:
        options: Any = {"context": "alloc", "stacks": "python"} if self._labelled else {}
        options = options or {"context": None}
        torch.cuda.memory._record_memory_history("all", max_entries=_KEPT, **options)
        self.mark("build", "build")

    def stop(self) -> None:
        snapshot = torch.cuda.memory._snapshot(self._device)
        torch.cuda.memory._record_memory_history(None)
        index = self._device.index if self._device.index is not None else 0
        self.read(snapshot["device_traces"][index])

    def read(self, trace: list[dict[str, Any]]) -> None:
        """Take one device's trace, as a snapshot holds it."""
        self._trace = trace
        if len(trace) >= _KEPT:
            self.incomplete = f"the history holds {_KEPT:,} entries; its beginning is lost"

    def _here(self) -> None:
        # The record's times are whole µs of the same clock: nothing is allocated within some.
        time.sleep(_APART)
        self._times.append(time.time_ns() / 1000)
        time.sleep(_APART)

    def _events(self) -> Iterator[Event | None]:
        yield from merged(self._trace, self._times)


def merged(trace: Sequence[Mapping[str, Any]], times: Sequence[float]) -> Iterator[Event | None]:
    """A snapshot's trace as events, with None at each of these moments (µs since 1970)."""
    signs = 0
    for entry in trace:
        action = entry["action"]
        if action not in ("alloc", _FREED):
            continue
        while signs < len(times) and times[signs] <= entry["time_us"]:
            signs += 1
            yield None
        size = entry["size"] if action == "alloc" else -entry["size"]
        yield entry["addr"], size, _frame(entry.get("frames") or ())
    for _ in times[signs:]:
        yield None


def _frame(frames: Sequence[Mapping[str, Any]]) -> str:
    """The innermost frame outside torch's own library, as file:function."""
    for frame in frames:
        if "/torch/" not in frame["filename"]:
            return f"{frame['filename'].rpartition('/')[2]}:{frame['name']}"
    return str(frames[0]["name"]) if frames else ""


def _assembled(
    events: Iterator[Event | None],
    marks: Sequence[tuple[str, str]],
    named: Sequence[tuple[int, Names]],
) -> Tape:
    tape = Tape()
    alive: dict[int, int] = {}
    names = dict(named)
    seen = 0
    phase = "build"
    for event in events:
        if event is None:
            seen += 1
            if seen in names:
                _assign(tape, alive, names[seen])
            entered = marks[seen - 1]
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
    final = {p: n for _, one in named for p, n in one.items() if n[0] != "gradients"}
    _assign(tape, alive, final)
    return tape


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
    """Names for ``Recorder.name``: each tensor's storage with its role."""
    return {
        tensor.untyped_storage().data_ptr(): (role, name)
        for name, tensor in named.items()
        if tensor.device.type != "meta"
    }
