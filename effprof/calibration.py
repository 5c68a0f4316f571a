"""What probes measured of a card, for the estimates that follow: named constants, nothing fitted to
totals.

The measurement store writes ``calibration.json`` beside itself; estimates read it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from effprof.files import home

SCHEMA = "effprof.calibration/1"


class Calibration(NamedTuple):
    """A card's constants: the medians of its newest probes with one driver and torch.

    ``context`` is bytes outside the caching allocator, ``workspace`` bytes of one cuBLAS handle,
    ``efficiency`` the rate that each class of kernel reached, by class and dtype. What was not
    measured is None.
    """

    card: str
    probes: int
    date: str
    context: int | None = None
    workspace: int | None = None
    efficiency: Mapping[str, float] = MappingProxyType({})
    torch: str = ""
    driver: str = ""

    def rates(self, dtype: str) -> dict[str, float] | None:
        """Rates by class of kernel in a compute dtype, or None where they were not measured."""
        names = (
            *("matmul", "attention", "traffic", "decomposition", "launch", "dispatch", "pace"),
            "fresh",
        )
        found = {name: self.efficiency.get(f"{name}_{dtype}") for name in names}
        known = {name: value for name, value in found.items() if value is not None}
        return known if known.keys() >= set(names[:-1]) else None

    def __str__(self) -> str:
        probes = "1 probe" if self.probes == 1 else f"{self.probes} probes"
        return f"calibrated by {probes} on {self.date}"

    def as_dict(self) -> dict[str, Any]:
        """The JSON object, without the card's name, which is its key in the file."""
        names = ("probes", "date", "context", "workspace", "torch", "driver")
        return {name: getattr(self, name) for name in names} | {"efficiency": dict(self.efficiency)}


def path() -> Path:
    """Where the constants are."""
    return home() / "calibration.json"


def of(card: str) -> Calibration | None:
    """A card's constants, or None where it was never probed.

    A damaged file is none: the next probe writes it anew.
    """
    try:
        text = path().read_text(encoding="utf-8")
    except (OSError, ValueError):  # ValueError: it is no text
        return None
    import json

    try:
        document = json.loads(text)
        row = document["cards"].get(card) if document.get("schema") == SCHEMA else None
        return None if row is None else _checked(Calibration(card, **row))
    except (ValueError, TypeError, AttributeError, KeyError):
        return None


def _checked(found: Calibration) -> Calibration:
    """Raises ValueError for constants that are none."""
    sizes = [one for one in (found.context, found.workspace) if one is not None]
    rates = [one for name, one in found.efficiency.items() if not name.startswith("launch")]
    if not all(isinstance(one, int) and 0 <= one < 1 << 50 for one in sizes):
        raise ValueError
    if not all(isinstance(one, float) and 1e-9 < one < 1e30 for one in rates):
        raise ValueError
    if not (isinstance(found.probes, int) and isinstance(found.date, str)):
        raise ValueError
    return found


def this_cpu() -> str:
    """The processor this process runs on, as calibrations name it."""
    name, cores = "cpu", os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        import platform

        name = platform.processor() or platform.machine() or name
    return f"{name} × {cores}"


def document(found: Mapping[str, Calibration]) -> dict[str, Any]:
    """The file's content."""
    return {"schema": SCHEMA, "cards": {card: one.as_dict() for card, one in found.items()}}
