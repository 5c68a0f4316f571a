"""Tapes and torch's memory snapshots: the pickles of ``torch.cuda.memory._snapshot()``.

Written ones open in PyTorch's memory_viz, each block with the module and the operation that made
it; read ones are plain values, and nothing in a file is ever executed.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from effprof.allocator import SMALL_SEGMENT, Action, Settings, configuration, replay
from effprof.errors import EffprofError
from effprof.tape import ROLES, Tape

_FREES = "free_completed"


class _PlainUnpickler(pickle.Unpickler):
    """Containers, text and numbers only."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it has outside references")


def read(path: Path) -> dict[str, Any]:
    """A snapshot's plain values. Raises EffprofError for anything else."""
    try:
        found = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except OSError as problem:
        raise EffprofError(f"Cannot read {str(path)!r}: {problem.strerror}.", "Check it.") from None
    except Exception as problem:  # noqa: BLE001 - a broken pickle raises nearly anything
        raise EffprofError(
            f"{str(path)!r} is not a memory snapshot: {problem}.",
            "Write one with torch.cuda.memory._dump_snapshot(path).",
        ) from None
    if not isinstance(found, dict) or "device_traces" not in found:
        raise EffprofError(
            f"{str(path)!r} holds no device_traces.",
            "Call torch.cuda.memory._record_memory_history() before what is to be recorded.",
        )
    return found


def recorded_tape(snapshot: dict[str, Any], device: int = 0) -> Tape:
    """What a device's trace allocated and freed; storages that were there before it are left out.

    Labels are the innermost frame, where frames were recorded.
    """
    tape = Tape()
    tape.mark("steady", "forward")
    alive: dict[int, tuple[int, int]] = {}
    for event in snapshot["device_traces"][device]:
        action, address, size = event["action"], event["addr"], event["size"]
        if action == "alloc":
            alive[address] = (len(tape.roles), size)
            tape.events.append(alive[address])
            frames = event.get("frames") or [{"name": "", "filename": ""}]
            role = frames[0].get("filename")  # where `write` puts it; nobody else's is told apart
            tape.roles.append(role if role in ROLES else "workspace")
            tape.labels.append(str(frames[0]["name"]))
        elif action == _FREES and address in alive:
            storage, size = alive.pop(address)
            tape.events.append((storage, -size))
    return tape


def snapshot(tape: Tape, allocator: str = "default") -> dict[str, Any]:
    """The snapshot that a run with this tape would leave on one device."""
    settings = Settings.of(allocator)
    actions: list[Action] = []
    result = replay(tape.events, len(tape.roles), settings, actions)
    trace = []
    for time, (name, address, size, storage) in enumerate(actions):
        frames = _frames(tape, storage) if storage >= 0 else []
        one = {"addr": address, "size": size, "stream": 0, "time_us": time, "frames": frames}
        if name == "free":
            trace += [{"action": "free_requested", **one}, {"action": _FREES, **one}]
        else:
            trace.append({"action": name, **one})
    return {
        "segments": _segments(tape, actions, result.blocks, settings),
        "device_traces": [trace],
        "allocator_settings": {
            "PYTORCH_CUDA_ALLOC_CONF": configuration(allocator),
            "max_split_size": settings.max_split_size or -1,
            "expandable_segments": settings.expandable,
        },
        "external_annotations": [],
    }


def write(path: Path, tape: Tape, allocator: str = "default") -> None:
    """Write a tape's snapshot; the file appears whole or not at all. Raises EffprofError."""
    from effprof.files import write_whole

    write_whole(path, pickle.dumps(snapshot(tape, allocator), protocol=4))


def _frames(tape: Tape, storage: int) -> list[dict[str, Any]]:
    return [{"name": tape.labels[storage], "filename": tape.roles[storage], "line": storage}]


def _segments(
    tape: Tape, actions: list[Action], sizes: list[int], settings: Settings
) -> list[dict[str, Any]]:
    """Every segment at the end of the tape, with its blocks in order."""
    alive: dict[int, tuple[int, int]] = {}  # address -> (storage, requested)
    found: list[list[int]] = []
    for name, address, size, storage in actions:
        if name == "alloc":
            alive[address] = (storage, size)
        elif name == "free":
            del alive[address]
        elif settings.expandable and found and found[-1][0] + found[-1][1] == address:
            found[-1][1] += size
        elif settings.expandable and any(start + held == address for start, held in found):
            next(one for one in found if one[0] + one[1] == address)[1] += size
        else:
            found.append([address, size])
    return [_segment(tape, start, size, alive, sizes, settings) for start, size in sorted(found)]


def _segment(
    tape: Tape,
    start: int,
    size: int,
    alive: dict[int, tuple[int, int]],
    sizes: list[int],
    settings: Settings,
) -> dict[str, Any]:
    blocks: list[dict[str, Any]] = []
    at, requested, allocated = start, 0, 0
    inside = sorted(address for address in alive if start <= address < start + size)
    for address in [*inside, start + size]:
        if address > at:
            gap = {"address": at, "size": address - at, "requested_size": 0, "state": "inactive"}
            blocks.append({**gap, "frames": []})
        if address in alive and address < start + size:
            storage, asked = alive[address]
            held = {"address": address, "size": sizes[storage], "requested_size": asked}
            frames = _frames(tape, storage)
            blocks.append({**held, "state": "active_allocated", "frames": frames})
            at, requested, allocated = (
                address + sizes[storage],
                requested + asked,
                allocated + sizes[storage],
            )
    small = start < 2**60 if settings.expandable else size <= SMALL_SEGMENT
    return {
        "device": 0,
        "address": start,
        "total_size": size,
        "allocated_size": allocated,
        "active_size": allocated,
        "requested_size": requested,
        "stream": 0,
        "segment_type": "small" if small else "large",
        "segment_pool_id": (0, 0),
        "is_expandable": settings.expandable,
        "frames": [],
        "blocks": blocks,
    }
