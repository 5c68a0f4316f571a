"""The machine itself: memory of a process and of the host, energy, the kernel's OOM kills."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
_RAPL = Path("/sys/class/powercap")


def rss(process: psutil.Process | None = None) -> int:
    """Resident bytes of a process, this one by default."""
    return int((process or psutil.Process()).memory_info().rss)


def available() -> int:
    """Bytes a new process can have before the system, or this container, runs out."""
    free = int(psutil.virtual_memory().available)
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    if limit is None or used is None:
        return free
    return max(min(free, limit - used + (_stat("inactive_file") or 0)), 0)


def total() -> int:
    """Bytes of memory: the host's, or this container's where it has less."""
    whole, limit = int(psutil.virtual_memory().total), _number(_CGROUP / "memory.max")
    return whole if limit is None else min(whole, limit)


def oom_kills() -> int | None:
    """How many processes the kernel has killed for memory since it started, here or in all."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return None


def energy() -> float | None:
    """Joules the CPU packages have used, by RAPL; None where it is not there or not readable.

    The counters wrap around: a window shorter than a minute meets that once in hours.
    """
    found = [_number(path / "energy_uj") for path in _RAPL.glob("intel-rapl:[0-9]")]
    if not found or None in found:
        return None
    return sum(one for one in found if one is not None) / 1e6


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # not there, not allowed, or "max"
        return None


def _stat(name: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return None
