"""A measurement held against the estimate of the same plan, bucket by bucket."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from effprof import gpus, readers
from effprof.estimator.estimate import Estimate, estimate
from effprof.gpus import Gpu
from effprof.plan import Plan
from effprof.prober.records import Probe
from effprof.readers import Unmatched
from effprof.tape import ROLES

SCHEMA = "effprof.probe/1"
TOTALS = ("peak_allocated", "peak_reserved", "context", "process_total")
HELD = ("peak_allocated", "peak_reserved", "process_total")  # what a tolerance is about
MARGIN = 0.05
_NAMED = 10


@dataclass(frozen=True, slots=True)
class Bucket:
    """One line of the comparison, in bytes or (``unit`` s) seconds.

    ``error`` is estimated over measured minus one, or None.
    """

    name: str
    estimated: float
    measured: float
    unit: str = "B"

    @property
    def error(self) -> float | None:
        return self.estimated / self.measured - 1 if self.measured else None


@dataclass(frozen=True)
class Comparison:
    """A probe's outcome beside its estimate. ``at_peak`` and ``resident`` are what both can say.

    ``limit`` is the bytes the process could have had on its device, ``need`` what it took (None:
    not measured). ``tensors`` are storages that only one side has at its peak.
    """

    probe: Probe
    estimate: Estimate
    at_peak: tuple[Bucket, ...]
    resident: tuple[Bucket, ...]
    tensors: tuple[Unmatched, ...]
    limit: int | None
    need: int | None
    margin: float = MARGIN

    @property
    def plan(self) -> Plan:
        return self.probe.plan

    @property
    def verdict(self) -> str:
        """OOM, DOES NOT FIT, TIGHT (within the margin of the limit), FITS, or UNKNOWN."""
        if self.probe.outcome == "oom":
            return "OOM"
        if self.probe.outcome != "ok" or self.need is None or self.limit is None:
            return "UNKNOWN"
        if self.need > self.limit:
            return "DOES NOT FIT"
        return "TIGHT" if self.need > self.limit * (1 - self.margin) else "FITS"

    @property
    def worst(self) -> Bucket | None:
        """The total that the estimate misses most, in either direction."""
        found = [one for one in self.at_peak if one.name in HELD and one.error is not None]
        return max(found, key=lambda one: abs(one.error or 0), default=None)

    def within(self, tolerance: float) -> bool:
        """Whether the probe ran and every measured total is within a relative tolerance."""
        worst = self.worst
        return (
            self.probe.outcome == "ok"
            and worst is not None
            and abs(worst.error or 0) <= tolerance
            and self.verdict != "DOES NOT FIT"
        )

    def as_dict(self) -> dict[str, Any]:
        """The JSON document: bytes, seconds, signed relative errors."""
        expected, probe = self.estimate.as_dict(), self.probe
        return {
            "schema": SCHEMA,
            "plan": self.plan.as_dict(),
            "outcome": probe.outcome,
            "detail": probe.detail,
            "verdict": self.verdict,
            "limit": self.limit,
            "need": self.need,
            "taken": probe.taken,
            "device": probe.device,
            "versions": probe.versions,
            "measured": probe.measured,
            "estimated": {
                name: expected[name] for name in ("memory", "resident", "time", "calibration")
            },
            "comparison": [
                {
                    "bucket": bucket.name,
                    "when": when,
                    "estimated": bucket.estimated,
                    "measured": bucket.measured,
                    "error": bucket.error,
                }
                for when, buckets in (("peak", self.at_peak), ("resident", self.resident))
                for bucket in buckets
            ],
            "tensors": [
                {"role": one.role, "bytes": one.bytes, "count": one.count, "label": one.label}
                for one in self.tensors
            ],
        }


def compare(
    probe: Probe, *, calibrated: bool = True, named: bool = False, margin: float = MARGIN
) -> Comparison:
    """Hold what a probe measured against the estimate of its plan on the card it ran on.

    ``named`` names the tensors behind the difference, where a tape was recorded.
    """
    expected = estimate(probe.plan, card=card_of(probe), calibrated=calibrated)
    document = expected.as_dict()
    measured = probe.measured
    at_peak = _buckets((*ROLES, *TOTALS), document["memory"], measured.get("memory", {}))
    timed, time = measured.get("step_seconds"), document["time"]
    if timed and time:
        at_peak += (Bucket("update", time["steady_seconds"], timed["median"], "s"),)
    tensors: list[Unmatched] = []
    if named and probe.peak is not None:
        tensors = readers.unmatched(expected.memory.peak, probe.peak)[:_NAMED]
    return Comparison(
        probe,
        expected,
        at_peak,
        _buckets(ROLES, document["resident"], measured.get("resident", {})),
        tuple(tensors),
        probe.device.get("available"),
        need_of(probe, expected.memory.context),
        margin,
    )


def card_of(probe: Probe) -> Gpu | None:
    """The card a probe ran on: the catalog's, else by the numbers the driver gave."""
    device = probe.device
    if not device.get("total"):
        return None
    if probe.plan.device == "cpu":
        return Gpu(device.get("card") or device["name"], device["name"], device["total"])
    if device.get("card") in gpus.catalog():
        return gpus.catalog()[device["card"]]
    return Gpu(device["name"], device["name"], device["total"], device.get("capability"))


def need_of(probe: Probe, context: int | None) -> int | None:
    """Bytes the process took of its device: on a GPU what NVML says, else reserved memory and the
    estimated context; on a CPU its resident set, libraries included.
    """
    memory = probe.measured.get("memory", {})
    if probe.plan.device == "cpu":
        found: int | None = probe.measured.get("rss_peak")
        return found
    process: int | None = memory.get("process_total")
    reserved = memory.get("peak_reserved")
    if process is None and reserved is not None:
        return int(reserved) + (context or 0)
    return process


def _buckets(
    names: tuple[str, ...], estimated: dict[str, Any], measured: dict[str, Any]
) -> tuple[Bucket, ...]:
    return tuple(
        Bucket(name, estimated[name], measured[name])
        for name in names
        if measured.get(name) is not None and estimated.get(name) is not None
    )
