"""Where a probe runs: what it asks of a CUDA device, and the CPU's twin of each answer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from effprof import gpus
from effprof.calibration import this_cpu
from effprof.gpus import Gpu
from effprof.measure import host, nvml, visible
from effprof.measure.nvml import Driver, Reading, Session
from effprof.measure.process import Own, own
from effprof.measure.recorder import CpuRecorder, CudaRecorder, Recorder
from effprof.measure.sampler import GpuSource, HostSource, Source


class Place(Protocol):
    """A device under measurement. Sizes are bytes; None is what it does not count."""

    @property
    def source(self) -> Source: ...
    def describe(self) -> dict[str, Any]: ...
    def recorder(self, *, labelled: bool) -> Recorder: ...
    def synchronise(self) -> None: ...
    def restart_peak(self) -> None: ...
    def allocated_peak(self) -> int | None: ...
    def reserved(self) -> int | None: ...
    def process(self) -> tuple[int | None, str]: ...
    def pid(self) -> int | None: ...
    def workspace(self) -> int | None: ...
    def card(self) -> Gpu: ...


class CpuPlace:
    """The CPU: its allocator keeps no counters, so sizes come from the record and the process."""

    def __init__(self) -> None:
        self.source: Source = HostSource()
        self._base = host.rss()

    def describe(self) -> dict[str, Any]:
        """The processor and the memory a process can have."""
        return {
            "kind": "cpu",
            "name": this_cpu(),
            "threads": torch.get_num_threads(),
            "total": host.total(),
            # What the libraries take is in the process's own figure, too.
            "available": host.available() + self._base,
            "card": this_cpu(),
            "reasons": {},
        }

    def recorder(self, *, labelled: bool) -> Recorder:
        return CpuRecorder()

    def synchronise(self) -> None: ...

    def restart_peak(self) -> None: ...

    def allocated_peak(self) -> int | None:
        return None

    def reserved(self) -> int | None:
        return None

    def process(self) -> tuple[int | None, str]:
        return host.rss(), "resident set"

    def card(self) -> Gpu:
        return gpus.DEFAULT

    def pid(self) -> int | None:
        return None

    def workspace(self) -> int | None:
        return None


class CudaPlace:
    """A CUDA device: torch's counters, and NVML's view where there is one."""

    def __init__(self, device: torch.device, session: Session | Driver) -> None:
        self._device, self._session = device, session
        self._uuid = str(torch.cuda.get_device_properties(device).uuid)
        found = None
        if isinstance(session, Session):
            found = visible.device_of(self._uuid, session.devices())
        self._found = found
        self.source: Source = _Nothing(session)
        if isinstance(session, Session) and found is not None:
            self.source = GpuSource(session, found.uuid)
        self._before = self.source.read()  # before anything touches the device
        self._own: Own | None = None

    def describe(self) -> dict[str, Any]:
        """The device, its driver, and what was free on it before this process began."""
        found, before = self._found, self._before
        driver = self._session
        driver = driver.driver() if isinstance(driver, Session) else driver
        name = torch.cuda.get_device_name(self._device)
        total, card = self._total(), self._recognised()
        major, minor = torch.cuda.get_device_capability(self._device)
        reasons = dict(before.reasons)
        if driver.problem:
            reasons["nvml"] = driver.problem
        return {
            "kind": "cuda",
            "name": name,
            "uuid": found.uuid if found else self._uuid,
            "parent": found.parent if found else None,
            "card": card.name if card else None,
            "capability": major + minor / 10,
            "driver": driver.version,
            "cuda": torch.version.cuda,
            "power_limit": found.power_limit if found else None,
            "total": total,
            "available": before.free or int(torch.cuda.mem_get_info(self._device)[0]),
            "used_before": before.used,
            "reasons": reasons,
        }

    def recorder(self, *, labelled: bool) -> Recorder:
        return CudaRecorder(self._device, labelled=labelled)

    def synchronise(self) -> None:
        torch.cuda.synchronize(self._device)

    def restart_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def allocated_peak(self) -> int | None:
        return int(torch.cuda.max_memory_allocated(self._device))

    def reserved(self) -> int | None:
        return int(torch.cuda.memory_reserved(self._device))

    def _mine(self) -> Own | None:
        if self._own is None:
            self._own = own(self._before, self.source.read(), os.getpid())
        return self._own

    def process(self) -> tuple[int | None, str]:
        """This process's bytes on the device, and how that is known (or why not)."""
        mine, now = self._mine(), self.source.read()
        if mine is None:
            return None, "; ".join(now.reasons.values()) or "NVML lists no processes"
        return mine.memory(now), mine.meter

    def pid(self) -> int | None:
        mine = self._mine()
        return None if mine is None else mine.pid

    def _total(self) -> int:
        return self._before.total or int(torch.cuda.mem_get_info(self._device)[1])

    def _recognised(self) -> Gpu | None:
        return gpus.recognise(torch.cuda.get_device_name(self._device), self._total())

    def card(self) -> Gpu:
        """The catalog's, else one of its capability."""
        major, minor = torch.cuda.get_device_capability(self._device)
        name = torch.cuda.get_device_name(self._device)
        return gpus.here(name, self._total(), major + minor / 10)

    def workspace(self) -> int | None:
        """Bytes one cuBLAS handle asks of the caching allocator, by asking anew; None where the
        environment sets them.
        """
        if "CUBLAS_WORKSPACE_CONFIG" in os.environ:
            return None
        torch._C._cuda_clearCublasWorkspaces()
        one = torch.zeros(16, 16, dtype=torch.bfloat16, device=self._device)
        two = torch.empty_like(one)
        before = self._requested()
        torch.mm(one, one, out=two)
        return self._requested() - before

    def _requested(self) -> int:
        """Without the unsplit tails of blocks, which are the allocator's."""
        return int(torch.cuda.memory_stats(self._device)["requested_bytes.all.current"])


class _Nothing:
    """NVML cannot be used, or does not list the device."""

    def __init__(self, session: Session | Driver) -> None:
        problem = session.problem if isinstance(session, Driver) else None
        self._reading = Reading(reasons={"nvml": problem or "NVML does not list this device"})

    def read(self) -> Reading:
        return self._reading


@contextmanager
def place(kind: str, device: torch.device) -> Iterator[Place]:
    """The device a plan of this kind (cuda or cpu) is measured on."""
    if kind == "cpu":
        yield CpuPlace()
        return
    with nvml.session() as session:
        yield CudaPlace(device, session)
