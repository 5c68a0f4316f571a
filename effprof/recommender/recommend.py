"""recommend(): the plan to run on a card, why, what else there is, what would change the answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from effprof.errors import UsageError
from effprof.gpus import Gpu
from effprof.recommender.choice import Choice, Chooser, Limits
from effprof.recommender.compare import Row
from effprof.recommender.remedies import Remedy
from effprof.recommender.search import Search, Told
from effprof.recommender.space import Candidate, Candidates, Space, candidates
from effprof.recommender.unmet import nothing
from effprof.recommender.words import batch, change, command, reasons, title

SCHEMA = "effprof.recommend/1"


@dataclass(frozen=True)
class Recommendation:
    """``best`` is None where nothing keeps the limits: then ``closest`` is what comes nearest and
    ``remedies`` are changes that make it fit. ``nearest`` is the plan of a lower perplexity that
    lacks least memory; ``full`` the default method's plan, whether it fits or not.
    """

    space: Space
    card: Gpu
    limits: Limits
    objective: str
    candidates: Candidates
    best: Choice | None
    pareto: Sequence[Choice]
    full: Choice | None
    nearest: Choice | None
    closest: Choice | None
    remedies: Sequence[Remedy]
    feasible: Sequence[dict[str, Any]]
    plans: int
    seconds: float
    every: bool
    problem: str = ""

    @property
    def not_searched(self) -> set[str]:
        """Methods left for where nothing else fits."""
        found = self.candidates
        rest = () if self.every else found.others
        return {one.plan.method for one in rest} - {one.plan.method for one in found.first}

    @property
    def next(self) -> tuple[str, ...]:
        """The commands for the best plan: a probe runs one process."""
        return ("validate", "train") if self.space.gpus == 1 else ("train",)

    @property
    def reasons(self) -> list[str]:
        """Why, in sentences."""
        return [self.problem] if self.best is None else reasons(self, self.best)

    def as_dict(self) -> dict[str, Any]:
        """The JSON document: bytes, seconds; rows are those of compare, each with its plan."""
        found = self.candidates
        best = self.best
        return {
            "schema": SCHEMA,
            "plan": None if best is None else best.estimate.plan.as_dict(),
            "gpu": self.card.name,
            "objective": self.objective,
            "limits": {
                "memory": self.limits.memory,
                "margin": self.limits.margin,
                "hours": self.limits.hours,
                "tokens_per_second": self.limits.tokens_per_second,
                "perplexity": self.limits.perplexity,
            },
            "global_batch": self.space.global_batch,
            "lineage": found.lineage or None,
            "ordered_as": found.borrowed or None,
            "best": _row(best, self.limits),
            "reasons": self.reasons,
            "change": change(self),
            "pareto": [_row(one, self.limits) for one in self.pareto],
            "feasible": list(self.feasible),
            "full": _row(self.full, self.limits),
            "nearest": _row(self.nearest, self.limits),
            "closest": _row(self.closest, self.limits),
            "remedies": [one.as_dict() for one in self.remedies],
            "commands": {}
            if best is None
            else {
                name: command(best.estimate.plan, name, lineage=best.estimate.lineage)
                for name in self.next
            },
            "left_out": dict(found.left_out),
            "not_searched": sorted(self.not_searched),
            "searched": {"plans": self.plans, "seconds": self.seconds},
        }


def _row(choice: Choice | None, limits: Limits) -> dict[str, Any] | None:
    if choice is None:
        return None
    spare = limits.memory - choice.total
    plan = choice.estimate.plan
    own = {"title": title(plan), "batch": batch(plan)} | Row(choice.estimate).as_dict()
    own |= {"fits": spare >= 0, "headroom": spare}
    time, price = choice.estimate.time, choice.estimate.price
    own |= {"run_cost": None if time is None else time.cost(price)}
    return own | {"plan": plan.as_dict()}


def recommend(
    space: Space,
    card: Gpu,
    limits: Limits,
    *,
    objective: str = "quality",
    price: float | None = None,
    lineage: str = "",
    told: Told = lambda done, total: None,
) -> Recommendation:
    """Search a space for a card and choose.

    Methods of which no perplexity is known are chosen where they were named or nothing else fits.
    Raises UsageError where nothing can be searched.
    """
    began, named = time.perf_counter(), space.named
    every = candidates(space, lineage)
    if every.borrowed and limits.perplexity is not None:
        raise UsageError(
            "--max-perplexity cannot be kept: nothing is published of a run like this.",
            "Leave it out.",
        )
    search = Search(space, card)
    for tried in (every.first, every.others):
        found = search.found(tried, told)
        chooser = Chooser(found, card, limits, objective, price, every.lineage)
        rows = np.flatnonzero(chooser.allowed)
        known = rows[~np.isnan(found.perplexity[rows])]
        best = None if named and objective != "quality" else chooser.fitting(known)
        best = best or chooser.fitting(rows)
        if best is not None or not every.others:
            break
    took = time.perf_counter() - began
    full = _full(chooser, rows)
    nearest, closest, ways, problem = None, None, list[Remedy](), ""
    if best is None:
        closest, ways, problem = nothing(chooser, card, limits)
    else:
        nearest = chooser.nearest(known, best.row)
    pareto = chooser.pareto(known if len(known) and not named else rows) if best else []
    return Recommendation(
        space,
        card,
        limits,
        objective,
        every,
        best,
        pareto,
        full,
        nearest,
        closest,
        ways,
        [_recipe(found.candidates[at]) for at in chooser.feasible(rows)],
        len(found),
        took,
        len(found.candidates) > len(every.first),
        problem,
    )


def _recipe(one: Candidate) -> dict[str, Any]:
    """A way to train of which some batch fits; ``perplexity`` is what the search ordered it by."""
    names = ("method", "update", "rank", "state_dtype", "per_layer_update")
    own = {name: getattr(one.plan, name) for name in names}
    return own | {"parallel": one.plan.parallel, "perplexity": one.perplexity}


def _full(chooser: Chooser, rows: Any) -> Choice | None:
    """The default method's best plan that fits, else its smallest."""
    from effprof import registry

    found = chooser.found
    default = [one.plan.method == registry.default() for one in found.candidates]
    own = rows[np.array(default)[found.candidate[rows]]]
    if not len(own):
        return None
    smallest = int(own[np.argmin(chooser.least[own])])
    return chooser.fitting(own) or Choice(smallest, chooser.estimate(smallest))
