"""The best plans of a recommendation probed here, and ordered by what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from effprof.plan import from_dict
from effprof.prober.compare import Comparison
from effprof.prober.run import Habits
from effprof.prober.validate import validate
from effprof.recommender.choice import Choice
from effprof.recommender.recommend import Recommendation

_FITTING = ("FITS", "TIGHT")


@dataclass(frozen=True)
class Tried:
    """A plan that was recommended, and what it did here."""

    choice: Choice
    result: Comparison

    @property
    def fits(self) -> bool:
        """Whether it ran and its process stayed on the device."""
        return self.result.verdict in _FITTING

    @property
    def seconds(self) -> float | None:
        """Of one measured update, over the positions it has: None where none was timed."""
        timed = self.result.probe.measured.get("step_seconds")
        plan = self.result.plan
        return timed["median"] / (plan.global_batch * plan.seq_len) if timed else None


@dataclass(frozen=True)
class Measured:
    """What was tried, the best by measurement first."""

    tried: tuple[Tried, ...]

    @property
    def best(self) -> Tried | None:
        """The first that fits."""
        return next((one for one in self.tried if one.fits), None)

    def as_dict(self) -> dict[str, Any]:
        """The JSON object: each probe's document in the new order, with its old place."""
        return {
            "best": None if self.best is None else self.best.result.plan.as_dict(),
            "results": [one.result.as_dict() for one in self.tried],
        }


def measured(found: Recommendation, wanted: int) -> Measured:
    """Probe the first ``wanted`` plans. What does not fit comes last; the others by the objective,
    with measured seconds and bytes in place of estimated ones.
    """
    assert found.best is not None
    first = found.best
    choices = [first, *(one for one in found.pareto if one.row != first.row)][:wanted]
    plans = [
        from_dict({**one.estimate.plan.as_dict(), "gpu": None, "tokens": None}) for one in choices
    ]
    results = validate(plans, Habits(), on_result=_tell).results
    tried = [Tried(*pair) for pair in zip(choices, results, strict=True)]
    place = {one.row: number for number, one in enumerate(choices)}
    ordered = sorted(
        tried, key=lambda one: (not one.fits, *_key(one, found.objective, place[one.choice.row]))
    )
    return Measured(tuple(ordered))


def _tell(result: Comparison, left: float) -> None:
    from effprof.report.terminal import line
    from effprof.units import duration

    more = f", about {duration(left)} left" if left else ""
    line(f"{result.plan.method}: {result.verdict}{more}")


def _key(one: Tried, objective: str, place: int) -> tuple[float, ...]:
    """By quality nothing was measured but whether it fits: the order stays."""
    if objective == "quality":
        return (place,)
    seconds = float("inf") if one.seconds is None else one.seconds
    memory = float(one.result.need or one.choice.total)
    return (memory, seconds) if objective == "memory" else (seconds, memory)
