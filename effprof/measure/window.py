"""A window: a stretch of a run between two synchronised moments, and what was measured in it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from effprof.measure.nvml import Reading
from effprof.measure.sampler import INTERVAL, Sampler, Source


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a window measured: seconds, bytes, joules, watts, MHz, °C, per cent.

    ``allocated`` and ``reserved`` are the peaks torch counted; ``used`` (the device's memory, or
    this process's resident set on a CPU) and ``process`` are the largest that was sampled.
    ``power`` is the mean, ``clock`` the lowest, ``temperature`` the highest. ``reasons`` says why a
    None is None.
    """

    seconds: float
    allocated: int | None = None
    reserved: int | None = None
    used: int | None = None
    process: int | None = None
    energy: float | None = None
    power: float | None = None
    utilisation: int | None = None
    clock: int | None = None
    temperature: int | None = None
    throttles: tuple[str, ...] = ()
    samples: int = 0
    late: int = 0
    reasons: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return dataclasses.asdict(self) | {"throttles": list(self.throttles)}


class Window:
    """``with Window(device, source, pid) as window: …`` and then ``window.measurement``."""

    measurement: Measurement

    def __init__(
        self,
        device: torch.device,
        source: Source,
        pid: int | None = None,
        interval: float = INTERVAL,
        *,
        peaks: bool = True,
    ) -> None:
        self._device, self._pid = device, pid
        self._counted = (
            peaks and device.type == "cuda"
        )  # else the peaks are someone else's to reset
        self._sampler = Sampler(source, interval)

    def __enter__(self) -> Window:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if self._counted:
            torch.cuda.reset_peak_memory_stats(self._device)
        self._sampler.__enter__()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        counted = self._counted
        if self._device.type == "cuda" and exception[0] is None:
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._began
        self._sampler.__exit__(*exception)
        self.measurement = summarised(
            seconds,
            self._sampler.samples,
            self._pid,
            late=self._sampler.late,
            allocated=torch.cuda.max_memory_allocated(self._device) if counted else None,
            reserved=torch.cuda.max_memory_reserved(self._device) if counted else None,
        )


def summarised(
    seconds: float,
    samples: Sequence[tuple[float, Reading]],
    pid: int | None = None,
    *,
    late: int = 0,
    allocated: int | None = None,
    reserved: int | None = None,
) -> Measurement:
    """The measurement of a window from its samples (seconds since its start, reading)."""
    readings = [one for _, one in samples]

    def known(name: str) -> list[Any]:
        return [value for one in readings if (value := getattr(one, name)) is not None]

    def most(name: str) -> Any:
        return max(known(name), default=None)

    energies, powers, rates = known("energy"), known("power"), known("utilisation")
    mine = [held for one in known("processes") if (held := one.get(pid)) is not None]
    throttles = dict.fromkeys(name for one in known("throttles") for name in one)
    reasons = {name: why for one in readings for name, why in one.reasons.items()}
    energy = energies[-1] - energies[0] if len(energies) > 1 else None
    if energy is not None and energy <= 0:  # it wrapped around, or the window is too short for it
        reasons["energy"] = "the counter did not advance"
        energy = None
    return Measurement(
        seconds,
        allocated,
        reserved,
        most("used"),
        max(mine, default=None),
        energy,
        sum(powers) / len(powers) if powers else energy / seconds if energy and seconds else None,
        round(sum(rates) / len(rates)) if rates else None,
        min(known("clock"), default=None),
        most("temperature"),
        tuple(throttles),
        len(readings),
        late,
        reasons,
    )
