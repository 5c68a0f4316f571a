"""How fast `effprof recommend` searches, and how exact what it searches with is, by hand:

    python benchmarks/search.py [--sample 1000]

First 100,000 and 1,000,000 plans in seconds of this process. Then random plans of the search
against their estimates: peak_allocated, what reserved memory is bounded by, and the time.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from effprof import gpus, registry
from effprof.errors import UsageError
from effprof.estimator.estimate import estimate
from effprof.plan import from_dict
from effprof.recommender.choice import RESERVED
from effprof.recommender.instants import regular
from effprof.recommender.search import Found, Search
from effprof.recommender.space import Space, candidates

UPDATES = ["full", "galore", "fira", "apollo", "spam", "stable-spam", "muon", "adam-mini"]
UPDATES += ["adafactor", "came", "scale-sgd"]
SPACES: dict[str, tuple[dict[str, Any], list[str], tuple[int, ...]]] = {
    "as asked": ({}, [], ()),
    "100,000": ({"global_batch": 5040}, UPDATES, tuple(range(64, 1025, 48))),
    "1,000,000": ({"global_batch": 5040}, UPDATES, tuple(range(8, 1025, 5))),
}
MODELS = ("60m", "130m", "350m", "1b")


def searched(
    values: dict[str, Any], methods: list[str], ranks: tuple[int, ...] = ()
) -> tuple[Found, float]:
    began = time.perf_counter()
    names = methods or registry.names()
    space = Space({"gpu": "a100-80gb", **values}, names, ranks, named=bool(methods))
    found = Search(space, gpus.gpu("a100-80gb")).found(candidates(space).first)
    return found, time.perf_counter() - began


def _quick(name: str) -> bool:
    return regular(from_dict({"model": "60m", "method": name}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sample", type=int, default=1000)
    sample = parser.parse_args().sample
    for name, (values, methods, ranks) in SPACES.items():
        found, seconds = searched({"model": "1b", **values}, methods, ranks)
        print(
            f"{name:>10}: {len(found):9,} plans in {seconds:6.2f} s, {len(found) / seconds:9,.0f}/s"
        )
    errors: dict[str, list[float]] = {"default": [], "expandable": []}
    bounds: dict[str, list[float]] = {"default": [], "expandable": []}
    times: list[float] = []
    random = np.random.default_rng(0)
    for model in MODELS:
        found, _ = searched({"model": model}, [n for n in registry.names() if _quick(n)])
        for row in random.choice(len(found), sample // len(MODELS), replace=False).tolist():
            try:
                exact = estimate(found.plan(row))
            except UsageError as problem:
                print(f"not a plan: {problem.message}")
                continue
            allocator = found.forms[found.form[row]].allocator
            errors[allocator].append(found.memory[row] / exact.memory.peak.size - 1)
            assert exact.memory.reserved is not None
            bounds[allocator].append(exact.memory.reserved / found.memory[row])
            if exact.time is not None:
                own = found.seconds[row] * exact.time.positions
                times.append(own / exact.time.update - 1)
    for allocator, found_errors in errors.items():
        print(f"{allocator:>10}: peak_allocated {_summary(found_errors)}; reserved at most "
              f"{max(bounds[allocator]):.3f} of it (bounded by {RESERVED})")  # fmt: skip
    print(f"      time: {_summary(times)}")


def _summary(errors: list[float]) -> str:
    size = np.abs(np.array(errors))
    within = 100 * float((size <= 0.005).mean())
    return (
        f"median |error| {100 * np.median(size):.3f} %, worst {100 * size.max():.2f} %, "
        f"{within:.1f} % of {len(size)} within 0.5 %"
    )


if __name__ == "__main__":
    main()
