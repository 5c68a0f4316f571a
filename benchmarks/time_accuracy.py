"""Update times on this machine's CPU, estimated after one probe, against what is measured.

    python benchmarks/time_accuracy.py [--models 9m 60m] [--methods full galore …] [--seconds 10]

One probe (60m, full-rank) calibrates. Every plan's updates are then timed in turns with those of
the calibrating plan, in one process, and its estimate is held against its median times the change
of the calibrating plan's own median since: a machine shared with others is not as fast as it was a
minute ago. Prints a table; exit 1 where the median |error| is above 10 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from effprof import calibration, registry
from effprof.estimator.estimate import estimate
from effprof.measure import store
from effprof.plan import Plan
from effprof.prober.compare import compare
from effprof.prober.run import Habits, probe
from effprof.trainer.build import build
from effprof.trainer.synthetic import one_update

CPU = torch.device("cpu")
LIMIT = 0.10
TURNS = 5


def stepper(plan: Plan) -> Callable[[], float]:
    """A function that makes one steady update and returns its seconds."""
    model, optimizer = build(plan, lr=1e-4)

    def step() -> float:
        optimizer.seek(1)
        began = time.perf_counter()
        one_update(model, optimizer, plan, CPU)
        return time.perf_counter() - began

    for _ in range(2):
        step()
    return step


def main() -> int:
    """Print a row for each plan and the median error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["9m", "20m", "35m", "60m"])
    parser.add_argument("--methods", nargs="+", default=list(registry.names()))
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10)
    given = parser.parse_args()
    common: dict[str, Any] = {"micro_batch": given.micro_batch, "device": "cpu"}
    reference = Plan(model="60m", **common)
    first = probe(reference, Habits(seconds=given.seconds))
    store.add(compare(first).as_dict())
    then = first.measured["step_seconds"]["median"]
    print(f"{calibration.this_cpu()}: calibrated by 60m full at {then:.3f} s")
    print(f"{'model':6} {'method':18} {'measured':>9} {'estimated':>9} {'error':>8}")
    beat, errors = stepper(reference), []
    for model in given.models:
        for method in given.methods:
            plan = Plan(model=model, method=method, **common)
            step = stepper(plan)
            pairs = [(beat(), step()) for _ in range(TURNS)]
            # The plan's time on the machine as it was when the probe ran.
            measured = statistics.median(own / ref for ref, own in pairs) * then
            found = estimate(plan).time
            assert found is not None
            errors.append(found.steady / measured - 1)
            row = f"{model:6} {method:18} {measured:9.3f} {found.steady:9.3f}"
            print(f"{row} {100 * errors[-1]:+7.1f}%", flush=True)
    middle = statistics.median(map(abs, errors))
    within = sum(abs(error) <= LIMIT for error in errors)
    worst = max(errors, key=abs)
    print(f"median |error| {100 * middle:.1f} %, worst {100 * worst:+.1f} %, ", end="")
    print(f"{within} of {len(errors)} within {100 * LIMIT:.0f} %")
    return int(middle > LIMIT)


if __name__ == "__main__":
    import os

    with tempfile.TemporaryDirectory() as home:
        os.environ["EFFPROF_HOME"] = home  # this probe alone calibrates
        sys.exit(main())
