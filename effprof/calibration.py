"""What probes measured of a card, for the estimates that follow: named constants, nothing fitted to
totals.

The measurement store writes ``calibration.json`` beside itself; estimates read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effprof.files import home

SCHEMA = "effprof.calibration/1"


@dataclass(frozen=True, slots=True)
class Calibration:
    """A card's constants: the medians of its newest probes with one driver and torch.

    ``context`` is bytes outside the caching allocator, ``workspace`` bytes of one cuBLAS handle,
    ``efficiency`` what each class of kernel reaches of its roofline. What was not measured is None.
    """

    card: str
    probes: int
    date: str
    context: int | None = None
    workspace: int | None = None
    efficiency: Mapping[str, float] = field(default_factory=dict)
    torch: str = ""
    driver: str = ""

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
    except OSError:
        return None
    import json

    try:
        document = json.loads(text)
        row = document["cards"].get(card) if document.get("schema") == SCHEMA else None
        return None if row is None else Calibration(card, **row)
    except (ValueError, TypeError, AttributeError, KeyError):
        return None


def document(found: Mapping[str, Calibration]) -> dict[str, Any]:
    """The file's content."""
    return {"schema": SCHEMA, "cards": {card: one.as_dict() for card, one in found.items()}}
