"""Which of the driver's devices CUDA gives a process: CUDA_VISIBLE_DEVICES as CUDA reads it.

CUDA programming guide, "CUDA environment variables", and the MIG user guide, "Device enumeration":
the list ends at its first bad entry, a UUID may be cut short where it stays unique, a device named
twice leaves none, and a process sees whole GPUs or one MIG instance.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from effprof.errors import EffprofError
from effprof.measure.nvml import Device


@dataclass(frozen=True, slots=True)
class Visible:
    """The devices a process sees, in CUDA's order; ``note`` is what is uncertain or wrong."""

    devices: tuple[Device, ...]
    note: str = ""


def visible(devices: Sequence[Device], environment: Mapping[str, str] | None = None) -> Visible:
    """The devices that CUDA shows under these environment variables (this process's own)."""
    given = os.environ if environment is None else environment
    asked = given.get("CUDA_VISIBLE_DEVICES")
    whole = [one for one in devices if one.parent is None and not one.mig]
    parts = [one for one in devices if one.parent is not None]
    order = _order_note(whole, given)
    if asked is None:
        if whole or not parts:
            return Visible(tuple(whole), order)
        note = "one MIG instance of several: name it in CUDA_VISIBLE_DEVICES" if parts[1:] else ""
        return Visible((parts[0],), note)
    found: list[Device] = []
    by_index = False
    for entry in (part.strip() for part in asked.split(",")):
        one, problem = _entry(entry, devices)
        if one is None:
            ending = f"CUDA_VISIBLE_DEVICES={asked!r} ends at {entry!r}: {problem}"
            return Visible(tuple(found), ending if entry not in ("", "-1") else "")
        if one in found:
            return Visible((), f"CUDA_VISIBLE_DEVICES={asked!r} names {entry!r} twice")
        if one.parent is not None:
            return Visible((one,), "a process sees one MIG instance")
        by_index |= entry.isdecimal()
        found.append(one)
    return Visible(tuple(found), order if by_index else "")


def first(devices: Sequence[Device]) -> Device | None:
    """The device that CUDA calls 0, None where a process sees none.

    Raises EffprofError where the GPUs differ and the driver counts them in another order.
    """
    seen = visible(devices)
    if seen.note == _ORDER:
        raise EffprofError(
            "Which GPU is meant? They differ, and CUDA counts the fastest first, the driver by "
            "their place.",
            "Set CUDA_VISIBLE_DEVICES to the UUID of one (`nvidia-smi -L`), or "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID.",
        )
    return next(iter(seen.devices), None)


def _entry(entry: str, devices: Sequence[Device]) -> tuple[Device | None, str]:
    whole = [one for one in devices if one.parent is None]
    if entry.isdecimal():
        if int(entry) >= len(whole):
            return None, f"there are {len(whole)} GPUs"
        one = whole[int(entry)]
        if not one.mig:
            return one, ""
        instance = next((part for part in devices if part.parent == one.uuid), None)
        return instance, "the GPU is in MIG mode and has no instance"
    if entry.startswith(
        "MIG-GPU-"
    ):  # before driver 470: MIG-GPU-uuid/gpu instance/compute instance
        uuid, _, place = entry.removeprefix("MIG-").partition("/")
        for part in devices:
            if part.parent == uuid and part.place and place == "{}/{}".format(*part.place):
                return part, ""
        return None, "no such MIG instance"
    if not entry.startswith(("GPU-", "MIG-")):
        return None, "neither an index nor a UUID"
    matches = [one for one in devices if one.uuid.startswith(entry) and not one.mig]
    if len(matches) == 1:
        return matches[0], ""
    return None, "no such device" if not matches else "it fits more than one device"


def _order_note(whole: Sequence[Device], given: Mapping[str, str]) -> str:
    """CUDA's own order puts the fastest first: an index may mean another GPU than the driver's."""
    differ = len({one.name for one in whole}) > 1
    if not differ or given.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        return ""
    return _ORDER


_ORDER = "the GPUs differ and CUDA counts the fastest first: set CUDA_DEVICE_ORDER=PCI_BUS_ID"


def device_of(uuid: str, devices: Sequence[Device]) -> Device | None:
    """The device behind the UUID that torch gives, with or without its prefix.

    A process on a MIG instance may be told its GPU's: then its first instance that is visible.
    """
    bare = uuid.removeprefix("GPU-").removeprefix("MIG-")
    for one in devices:
        if one.uuid.partition("-")[2] == bare:
            if one.mig:
                shown = visible(devices).devices
                return next((part for part in shown if part.parent == one.uuid), one)
            return one
    return None
