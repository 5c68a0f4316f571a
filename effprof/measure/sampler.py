"""Sampling a device in a thread, on an absolute schedule: what happens between two counters."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from effprof.errors import UsageError
from effprof.measure import host
from effprof.measure.nvml import Reading, Session

INTERVAL = 0.020
LEAST_INTERVAL = 0.005
_KEPT = 60_000  # twenty minutes at the usual interval; then every second one is dropped


class Source(Protocol):
    """What can be read at any moment."""

    def read(self) -> Reading: ...


class GpuSource:
    """A device through NVML."""

    def __init__(self, session: Session, uuid: str) -> None:
        self._session, self._uuid = session, uuid

    def read(self) -> Reading:
        return self._session.read(self._uuid)


class HostSource:
    """This process and the CPU packages: the GPU's twin where there is none."""

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()

    def read(self) -> Reading:
        joules = host.energy()
        return Reading(
            used=host.rss(self._process),
            energy=joules,
            reasons={} if joules is not None else {"energy": "RAPL is not there or not readable"},
        )


def check_interval(seconds: float) -> None:
    """Raises UsageError for an interval that cannot be sampled.

    A full NVML reading takes up to 2 ms, in which the driver's lock keeps the measured run waiting.
    """
    if not LEAST_INTERVAL <= seconds <= 10:
        raise UsageError(
            f"--interval {seconds:g} cannot be sampled: below 5 ms NVML itself slows the measured "
            f"run, above 10 s nothing is seen.",
            "Type --interval 0.02.",
        )


class Sampler:
    """Reads a source every ``interval`` seconds, counted from the start: a late sample moves no
    later one, and one that is missed is not made up for. Raises UsageError for a bad interval.
    """

    def __init__(
        self,
        source: Source,
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        check_interval(interval)
        self.samples: list[tuple[float, Reading]] = []
        self.late = 0
        self._source, self._interval, self._clock = source, interval, clock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="effprof-sampler", daemon=True)

    def __enter__(self) -> Sampler:
        self._began = self._clock()
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self._take()

    def _run(self) -> None:
        number = 1
        while not self._stop.wait(max(self._began + number * self._interval - self._clock(), 0)):
            self._take()
            passed = int((self._clock() - self._began) / self._interval)
            self.late += max(passed - number, 0)
            number = max(passed, number) + 1

    def _take(self) -> None:
        self.samples.append((self._clock() - self._began, self._source.read()))
        if len(self.samples) > _KEPT:
            self.samples = self.samples[::2]
