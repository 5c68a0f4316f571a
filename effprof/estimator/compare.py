"""A measurement held against the estimate of the same plan, bucket by bucket."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from effprof.estimator.estimate import Estimate, estimate
from effprof.plan import Plan
from effprof.tape import ROLES

SCHEMA = "effprof.probe/1"


class Measured(Protocol):
    """What a probe returns."""

    @property
    def plan(self) -> Plan: ...
    @property
    def outcome(self) -> str: ...
    @property
    def detail(self) -> str: ...
    @property
    def measured(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Bucket:
    """One line of the comparison, in bytes.

    ``error`` is estimated over measured minus one, or None.
    """

    name: str
    estimated: int
    measured: int

    @property
    def error(self) -> float | None:
        return self.estimated / self.measured - 1 if self.measured else None


@dataclass(frozen=True)
class Comparison:
    """A probe's outcome beside its estimate. ``at_peak`` and ``resident`` are what both can say."""

    plan: Plan
    outcome: str
    detail: str
    measured: dict[str, Any]
    estimate: Estimate
    at_peak: tuple[Bucket, ...]
    resident: tuple[Bucket, ...]

    def as_dict(self) -> dict[str, Any]:
        """The JSON document: bytes, seconds, signed relative errors."""
        expected = self.estimate.as_dict()
        return {
            "schema": SCHEMA,
            "plan": self.plan.as_dict(),
            "outcome": self.outcome,
            "detail": self.detail,
            "measured": self.measured,
            "estimated": {"memory": expected["memory"], "resident": expected["resident"]},
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
        }


def compare(probe: Measured) -> Comparison:
    """Hold what a probe measured against the estimate of its plan."""
    expected = estimate(probe.plan)
    document = expected.as_dict()
    return Comparison(
        probe.plan,
        probe.outcome,
        probe.detail,
        probe.measured,
        expected,
        _buckets(
            (*ROLES, "peak_allocated", "peak_reserved", "context", "process_total"),
            document["memory"],
            probe.measured.get("memory", {}),
        ),
        _buckets(ROLES, document["resident"], probe.measured.get("resident", {})),
    )


def _buckets(
    names: tuple[str, ...], estimated: dict[str, Any], measured: dict[str, Any]
) -> tuple[Bucket, ...]:
    return tuple(
        Bucket(name, estimated[name], measured[name])
        for name in names
        if measured.get(name) is not None and estimated.get(name) is not None
    )
