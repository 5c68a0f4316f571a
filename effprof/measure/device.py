"""What a run can read of its device cheaply: memory now and at its peak, total, and the peak
FLOP rate.
"""

from __future__ import annotations

import resource
from typing import Protocol

import torch

from effprof import gpus
from effprof.measure import host


class DeviceMeter(Protocol):
    """``now`` and ``peak`` are bytes of this process, by the meter of that ``name``; ``total`` and
    ``free`` (now) are the device's.
    """

    @property
    def name(self) -> str: ...
    def begin(self) -> None: ...
    def now(self) -> int: ...
    def peak(self) -> int: ...
    def total(self) -> int: ...
    def free(self) -> int: ...
    def mfu(self, flops_per_second: float, /) -> float | None: ...


class CpuMeter:
    """This process's resident set above what it was at ``begin``: the allocator has no counters."""

    name = "resident set, libraries left out"

    def __init__(self) -> None:
        self._base = 0

    def begin(self) -> None:
        """What is resident now, libraries and data, is not the run's."""
        self._base = host.rss()

    def now(self) -> int:
        return max(host.rss() - self._base, 0)

    def peak(self) -> int:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return int(max(peak - self._base, self.now()))

    def total(self) -> int:
        return host.total()

    def free(self) -> int:
        return host.available()

    def mfu(self, flops_per_second: float) -> float | None:
        return None


class CudaMeter:
    """torch's own counters of one GPU; the peak FLOP rate where the catalog knows the card."""

    name = "max_memory_allocated"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        name, total = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1]
        self._card = gpus.recognise(name, total)

    def begin(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def now(self) -> int:
        return int(torch.cuda.memory_allocated(self.device))

    def peak(self) -> int:
        return int(torch.cuda.max_memory_allocated(self.device))

    def total(self) -> int:
        return int(torch.cuda.mem_get_info(self.device)[1])

    def free(self) -> int:
        return int(torch.cuda.mem_get_info(self.device)[0])

    def mfu(self, flops_per_second: float) -> float | None:
        """Dense-equivalent model FLOPs over the card's dense bf16 peak."""
        if self._card is None or self._card.bf16_flops is None:
            return None
        return flops_per_second / self._card.bf16_flops


def meter(device: torch.device) -> DeviceMeter:
    """The meter of a torch device."""
    if device.type == "cuda":
        return CudaMeter(device)
    return CpuMeter()
