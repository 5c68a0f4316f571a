"""Which of the plans found: constraints, an objective, the Pareto set, each estimated in full."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from effprof.errors import UsageError
from effprof.estimator.estimate import Estimate, estimate
from effprof.gpus import Gpu
from effprof.recommender.search import Found, Numbers

OBJECTIVES = ("quality", "time", "memory", "cost")
# Reserved bytes over the search's peak_allocated: above every plan of benchmarks/search.py.
RESERVED = {"default": 1.6, "expandable": 1.4}
_REPLAYS = 24  # of one recipe, before its next plan that certainly fits is taken
_SHOWN = 12

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Limits:
    """What a plan has to keep: ``memory`` in bytes of the process, the card's less a margin."""

    memory: int
    margin: float
    hours: float | None = None
    tokens_per_second: float | None = None
    perplexity: float | None = None


@dataclass(frozen=True)
class Choice:
    """A plan of the search, estimated in full."""

    row: int
    estimate: Estimate

    @property
    def total(self) -> int:
        """Bytes of the process."""
        return self.estimate.total


class Chooser:
    """The plans of one search in the order of an objective."""

    def __init__(
        self,
        found: Found,
        card: Gpu,
        limits: Limits,
        objective: str,
        price: float | None,
        lineage: str,
    ) -> None:
        self.found, self.card, self.limits = found, card, limits
        self.objective, self.price, self.lineage = objective, price, lineage
        bound = np.array([RESERVED.get(one.allocator, RESERVED["default"]) for one in found.forms])
        outside = card.outside(found.space.gpus)
        self.least = found.memory + outside  # of the process: nothing but what is allocated
        self.most = found.memory * bound[found.form] + outside
        self.allowed = self._allowed()
        recipes: dict[Any, int] = {}
        own = [recipes.setdefault(one.recipe, len(recipes)) for one in found.candidates]
        self.recipe = np.array(own)[found.candidate]
        self._estimates: dict[int, Estimate] = {}

    def _allowed(self) -> npt.NDArray[np.bool_]:
        """Constraints other than memory. Raises UsageError for one that nothing can be said of."""
        found, limits = self.found, self.limits
        allowed = np.ones(len(found), np.bool_)
        if limits.perplexity is not None:
            allowed &= found.perplexity <= limits.perplexity
        tokens = self.found.space.values.get("tokens")
        for name, value in (("max-hours", limits.hours), ("cost", self.objective == "cost")):
            if value and not tokens:
                raise UsageError(f"--{name} needs a run's length.", "Add --tokens 13.1B.")
        if np.isnan(found.seconds).all() and (
            limits.hours or limits.tokens_per_second or self.objective in ("time", "cost")
        ):
            raise UsageError(
                f"No time is known on {self.card.title}: neither peaks nor a probe.",
                "Name a card of `effprof gpus`, or probe this one first.",
            )
        if limits.hours:
            assert tokens is not None
            allowed &= found.seconds * float(tokens) <= limits.hours * 3600
        if limits.tokens_per_second:
            allowed &= found.seconds <= 1 / limits.tokens_per_second
        return allowed

    def order(self, rows: Rows) -> Rows:
        """Best first. Under any objective updates have the rows asked for before fewer."""
        found = self.found
        perplexity = np.nan_to_num(found.perplexity[rows], nan=np.inf)
        seconds = np.nan_to_num(found.seconds[rows], nan=np.inf)
        memory, fewer = found.memory[rows], ~found.own_batch[rows]
        keys = {
            "quality": (memory, seconds, fewer, perplexity),
            "memory": (seconds, fewer, perplexity, memory),
        }
        by_time = (memory, perplexity, fewer, seconds)
        return rows[np.lexsort(keys.get(self.objective, by_time))]

    def estimate(self, row: int) -> Estimate:
        """The exact one, worked out once."""
        if row not in self._estimates:
            exact = estimate(self.found.plan(row), card=self.card, price=self.price)
            self._estimates[row] = dataclasses.replace(exact, lineage=self.lineage)
        return self._estimates[row]

    def fitting(self, rows: Rows) -> Choice | None:
        """The best of these rows whose exact estimate fits; those that may are replayed."""
        ordered = self.order(rows[self.least[rows] <= self.limits.memory])
        surely = self.most[ordered] <= self.limits.memory
        for tried, row in enumerate(ordered.tolist()):
            if tried >= _REPLAYS and not surely[tried]:
                continue
            exact = self.estimate(row)
            if exact.total <= self.limits.memory:
                return Choice(row, exact)
        return None

    def recipes(self, rows: Rows) -> Iterator[Rows]:
        """The rows of each recipe."""
        for recipe in np.unique(self.recipe[rows]):
            yield rows[self.recipe[rows] == recipe]

    def pareto(self, rows: Rows) -> list[Choice]:
        """The best fitting plan of each recipe, of those that no other beats in perplexity, in the
        time of its fastest plan and the memory of its smallest alike; the objective's best first.
        At most a dozen.
        """
        firsts, columns = [], []
        for own in self.recipes(rows[self.least[rows] <= self.limits.memory]):
            likely = own[self.most[own] <= self.limits.memory]
            firsts.append(self.order(likely if len(likely) else own)[0])
            found = self.found
            columns.append(
                (
                    found.perplexity[own[0]],
                    np.min(found.seconds[likely if len(likely) else own]),
                    np.min(found.memory[own]),
                )
            )
        chosen = []
        for row in self.order(_front(np.array(firsts, np.int64), np.array(columns))).tolist():
            best = self.fitting(rows[self.recipe[rows] == self.recipe[row]])
            if best is not None:
                chosen.append(best)
            if len(chosen) == _SHOWN:
                break
        return chosen

    def feasible(self, rows: Rows) -> list[int]:
        """The candidates of which some plan fits, by their number. Where none surely does the
        smallest is estimated in full.
        """
        found, limit = self.found, self.limits.memory
        fitting = []
        for number in np.unique(found.candidate[rows]).tolist():
            own = rows[found.candidate[rows] == number]
            smallest = int(own[np.argmin(self.least[own])])
            if self.most[own].min() <= limit or (
                self.least[smallest] <= limit and self.estimate(smallest).total <= limit
            ):
                fitting.append(number)
        return fitting

    def nearest(self, rows: Rows, best: Numbers | float) -> Choice | None:
        """The plan of a lower perplexity than ``best`` that lacks least memory."""
        better = rows[(self.found.perplexity[rows] < best) & self.found.own_batch[rows]]
        if not len(better):
            return None
        row = int(better[np.argmin(self.least[better])])
        return Choice(row, self.estimate(row))


def _front(rows: Rows, columns: Numbers) -> Rows:
    """The rows (one line of columns each) that no other is as good as in all, and better in one."""
    worst = np.nan_to_num(columns, nan=np.inf)
    kept = [not ((worst <= own).all(1) & (worst < own).any(1)).any() for own in worst]
    return rows[np.array(kept, np.bool_)]
