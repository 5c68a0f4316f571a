"""The single door to NVML: which GPUs there are, and what the driver says of one now.

What the driver cannot say is None, with the reason beside it; nothing here raises for a driver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

# Bits of nvmlClocksEventReasons that slow a GPU down; idle and a user's own clocks do not count.
THROTTLES = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
}
_GPU_CLOCK, _MEMORY_CLOCK, _CORE_SENSOR = (
    1,
    2,
    0,
)  # NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, or one MIG instance of one; sizes in bytes.

    ``index`` is NVML's own (PCI bus order), ``parent`` the UUID of the GPU a MIG instance is cut
    from, ``power_limit`` in watts. ``reasons`` says of each None why it is None.
    """

    index: int
    uuid: str
    name: str
    total: int | None
    parent: str | None = None
    place: tuple[int, int] | None = None  # a MIG instance's GPU and compute instance
    mig: bool = False  # a GPU cut into instances: nothing runs on it as a whole
    bus: str | None = None
    capability: float | None = None
    power_limit: float | None = None
    virtual: str | None = None
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reading:
    """What the driver says of one device at one moment: bytes, watts, joules, MHz, °C, per cent.

    ``processes`` maps a process to its bytes, None where the driver does not tell them.
    """

    total: int | None = None
    used: int | None = None
    free: int | None = None
    processes: dict[int, int | None] | None = None
    utilisation: int | None = None
    power: float | None = None
    energy: float | None = None
    clock: int | None = None
    memory_clock: int | None = None
    temperature: int | None = None
    throttles: tuple[str, ...] | None = None
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Driver:
    """The driver's version and the newest CUDA it runs; ``problem`` is why NVML cannot be used."""

    version: str | None = None
    cuda: str | None = None
    problem: str | None = None


class Session:
    """NVML while it is initialised."""

    def __init__(self, library: Any) -> None:
        self._nvml = library
        self._handles: dict[str, Any] = {}

    def driver(self) -> Driver:
        """Versions."""
        version, _ = self._ask(self._nvml.nvmlSystemGetDriverVersion)
        cuda, _ = self._ask(self._nvml.nvmlSystemGetCudaDriverVersion_v2)
        shown = None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}"
        return Driver(None if version is None else _text(version), shown)

    def devices(self) -> tuple[Device, ...]:
        """Every GPU in PCI bus order, each followed by its MIG instances.

        One that has fallen off the bus, or that this process may not see, is left out.
        """
        nvml, found = self._nvml, []
        count, _ = self._ask(nvml.nvmlDeviceGetCount)
        for index in range(count or 0):
            handle, _ = self._ask(nvml.nvmlDeviceGetHandleByIndex, index)
            whole = None if handle is None else self._device(index, handle)
            if whole is not None:
                found.append(whole)
                found += self._instances(whole, handle)
        return tuple(found)

    def _device(self, index: int, handle: Any, parent: Device | None = None) -> Device | None:
        nvml, reasons = self._nvml, dict[str, str]()

        def ask(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
            value, reason = self._ask(function, handle, *arguments)
            if reason:
                reasons[name] = reason
            return value

        uuid = ask("uuid", nvml.nvmlDeviceGetUUID)
        if uuid is None:
            return None
        name, memory = (
            ask("name", nvml.nvmlDeviceGetName),
            ask("total", nvml.nvmlDeviceGetMemoryInfo),
        )
        self._handles[_text(uuid)] = handle
        total = None if memory is None else int(memory.total)
        if parent is not None:
            places = (nvml.nvmlDeviceGetGpuInstanceId, nvml.nvmlDeviceGetComputeInstanceId)
            place = tuple(ask("place", one) for one in places)
            return Device(
                index,
                _text(uuid),
                _text(name) if name else f"{parent.name} (MIG)",
                total,
                parent.uuid,
                None if None in place else place,
                capability=parent.capability,
                reasons=reasons,
            )
        capability = ask("capability", nvml.nvmlDeviceGetCudaComputeCapability)
        mode, _ = self._ask(nvml.nvmlDeviceGetMigMode, handle)
        bus = ask("bus", nvml.nvmlDeviceGetPciInfo)
        limit = ask("power_limit", nvml.nvmlDeviceGetPowerManagementLimit)
        virtual, _ = self._ask(nvml.nvmlDeviceGetVirtualizationMode, handle)
        return Device(
            index,
            _text(uuid),
            _text(name or ""),
            total,
            mig=bool(mode and mode[0]),
            bus=None if bus is None else _text(bus.busId),
            capability=None if capability is None else capability[0] + capability[1] / 10,
            power_limit=None if limit is None else limit / 1000,
            virtual={1: "passthrough", 2: "vGPU", 3: "vGPU host", 4: "vSGA host"}.get(virtual),
            reasons=reasons,
        )

    def _instances(self, whole: Device, handle: Any) -> Iterator[Device]:
        if not whole.mig:
            return
        count, _ = self._ask(self._nvml.nvmlDeviceGetMaxMigDeviceCount, handle)
        for index in range(count or 0):
            part, _ = self._ask(self._nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index)
            found = None if part is None else self._device(whole.index, part, whole)
            if found is not None:
                yield found

    def read(self, uuid: str) -> Reading:
        """The device now. A device that is lost is a reading of reasons."""
        nvml, handle, reasons = self._nvml, self._handle(uuid), dict[str, str]()
        if handle is None:
            return Reading(reasons={"device": f"NVML does not list {uuid}"})

        def ask(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
            value, reason = self._ask(function, handle, *arguments)
            if reason:
                reasons[name] = reason
            return value

        memory = ask("memory", nvml.nvmlDeviceGetMemoryInfo)
        processes = ask("processes", nvml.nvmlDeviceGetComputeRunningProcesses)
        if processes and all(one.usedGpuMemory is None for one in processes):
            reasons["processes"] = "no memory per process (WSL, Windows' WDDM, or a vGPU)"
        rates = ask("utilisation", nvml.nvmlDeviceGetUtilizationRates)
        power = ask("power", nvml.nvmlDeviceGetPowerUsage)
        energy = ask("energy", nvml.nvmlDeviceGetTotalEnergyConsumption)
        bits = ask("throttles", nvml.nvmlDeviceGetCurrentClocksEventReasons)
        if "Not Found" in reasons.get("throttles", ""):  # its name before driver 535
            del reasons["throttles"]
            bits = ask("throttles", nvml.nvmlDeviceGetCurrentClocksThrottleReasons)
        return Reading(
            total=None if memory is None else int(memory.total),
            used=None if memory is None else int(memory.used),
            free=None if memory is None else int(memory.free),
            processes=None
            if processes is None
            else {int(one.pid): one.usedGpuMemory for one in processes},
            utilisation=None if rates is None else int(rates.gpu),
            power=None if power is None else power / 1000,
            energy=None if energy is None else energy / 1000,
            clock=ask("clock", nvml.nvmlDeviceGetClockInfo, _GPU_CLOCK),
            memory_clock=ask("memory_clock", nvml.nvmlDeviceGetClockInfo, _MEMORY_CLOCK),
            temperature=ask("temperature", nvml.nvmlDeviceGetTemperature, _CORE_SENSOR),
            throttles=None
            if bits is None
            else tuple(name for bit, name in THROTTLES.items() if bits & bit),
            reasons=reasons,
        )

    def _handle(self, uuid: str) -> Any:
        if not self._handles:
            self.devices()
        return self._handles.get(uuid)

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
        """A value and no reason, or None and the driver's reason."""
        try:
            return function(*arguments), ""
        except self._nvml.NVMLError as problem:
            return None, str(problem)
        except UnicodeDecodeError:
            return None, "the driver's text cannot be read"


@contextmanager
def session() -> Iterator[Session | Driver]:
    """NVML initialised, or, where it cannot be, a Driver that says why."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as problem:
        yield Driver(problem=_explained(problem))
        return
    try:
        yield Session(pynvml)
    finally:
        with suppress(pynvml.NVMLError):  # of a lost GPU there is nothing left to close
            pynvml.nvmlShutdown()


_PROBLEMS = {
    4: "no permission to use the driver",
    9: "the NVIDIA driver is not loaded (nvidia-smi says more)",
    12: "no NVIDIA driver: libnvidia-ml.so.1 is not found",
    15: "the GPU is lost: it has fallen off the bus; reset or reboot",
    18: "driver and library do not match: the driver was updated and not yet loaded; reboot",
}


def _explained(problem: Any) -> str:
    return _PROBLEMS.get(getattr(problem, "value", -1), str(problem))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
