"""Which of the processes that NVML lists is this one, and how much memory it has on the device."""

from __future__ import annotations

from dataclasses import dataclass

from effprof.measure.nvml import Reading

BY_PID = "NVML, this process"
BY_APPEARANCE = "NVML, the process that appeared when this one began (a container's host PID)"
BY_GROWTH = "growth of the device's memory (NVML tells no process apart here)"


@dataclass(frozen=True, slots=True)
class Own:
    """This process on a device: its number there (None: not listed), and how that is known.

    ``base`` is the device's used bytes before this process began, where only growth can be told.
    """

    pid: int | None
    meter: str
    base: int | None = None

    def memory(self, reading: Reading) -> int | None:
        """Bytes of this process in a reading, or None."""
        if self.pid is not None:
            return (reading.processes or {}).get(self.pid)
        if self.base is None or reading.used is None:
            return None
        return max(reading.used - self.base, 0)


def own(before: Reading, after: Reading, pid: int) -> Own | None:
    """Find this process from readings before and after it first touched the device.

    NVML in a container lists host PIDs, in WSL and vGPUs no memory. None where nothing is known.
    """
    listed = {number for number, held in (after.processes or {}).items() if held is not None}
    if pid in listed and pid not in (before.processes or {}):
        return Own(pid, BY_PID)
    appeared = listed - set(before.processes or {})
    if len(appeared) == 1 and before.processes is not None:
        return Own(appeared.pop(), BY_APPEARANCE)
    if before.used is not None:
        return Own(None, BY_GROWTH, before.used)
    return None
