"""The single door to NVML: what the driver says of a GPU and of this process.

What it cannot say is None.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One GPU as the driver sees it; sizes in bytes. ``reasons`` says why a None is None."""

    uuid: str
    name: str
    total: int | None
    used: int | None
    process: int | None
    driver: str | None
    reasons: tuple[str, ...]


@contextmanager
def _session() -> Iterator[Any]:
    """NVML started and stopped, or None with nothing raised where there is no usable driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def read(uuid: str | None = None, pid: int | None = None) -> tuple[GpuReading, ...]:
    """Every GPU, or the one with this UUID; memory of the process ``pid`` (this one by default).

    Empty where NVML cannot be used: no driver, or a driver that does not match its library.
    """
    with _session() as nvml:
        if nvml is None:
            return ()
        found = []
        try:
            count = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError:
            return ()
        for index in range(count):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                identity = _text(nvml.nvmlDeviceGetUUID(handle))
            except nvml.NVMLError:
                continue  # a GPU that has fallen off the bus, or one this process may not see
            if uuid is None or identity == _full(uuid):
                found.append(_reading(nvml, handle, identity, pid or os.getpid()))
        return tuple(found)


def _reading(nvml: Any, handle: Any, identity: str, pid: int) -> GpuReading:
    reasons: list[str] = []

    def ask(name: str, function: Any) -> Any:
        try:
            return function()
        except nvml.NVMLError as problem:
            reasons.append(f"{name}: {problem}")
            return None

    memory = ask("memory", lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    processes = ask("processes", lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle))
    mine = next((p for p in processes or () if p.pid == pid), None)
    if processes is not None and mine is None:
        reasons.append(
            f"process: the driver lists no process {pid} (in a container it shows the host's "
            f"numbers)"
        )
    elif mine is not None and mine.usedGpuMemory is None:
        reasons.append("process: the driver gives no memory per process (WSL, or Windows' WDDM)")
    return GpuReading(
        uuid=identity,
        name=_text(ask("name", lambda: nvml.nvmlDeviceGetName(handle)) or ""),
        total=memory.total if memory else None,
        used=memory.used if memory else None,
        process=mine.usedGpuMemory if mine else None,
        driver=_text(ask("driver", nvml.nvmlSystemGetDriverVersion) or "") or None,
        reasons=tuple(reasons),
    )


def _full(uuid: str) -> str:
    """torch gives a UUID without the prefix NVML writes before it."""
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
