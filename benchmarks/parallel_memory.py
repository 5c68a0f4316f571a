"""Two processes over gloo, recorded, against the estimate: every method under DDP and FSDP2.

usage: python benchmarks/parallel_memory.py [--model 9m] [--dtype bf16] [--methods full galore]

The recorded peak is of process 0, which has the most. gloo's own tensors are in both: a flat output
beside every gather and a copy of what is reduced and scattered, which NCCL does without.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from effprof import registry
from effprof.errors import UsageError
from effprof.estimator.memory import memory
from effprof.plan import Plan
from effprof.step import work_out
from effprof.tape import Tape, peak

sys.path.insert(0, str(Path(__file__).parent.parent))


def main() -> None:
    from tests.processes import run

    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="9m")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--methods", nargs="+", default=list(registry.names()))
    given = parser.parse_args()
    shape = {"micro_batch": 1, "seq_len": 32, "dtype": given.dtype, "device": "cpu", "gpus": 2}
    plans = []
    for parallel in ("ddp", "fsdp"):
        for method in given.methods:
            try:
                plans.append(Plan(model=given.model, method=method, parallel=parallel, **shape))
            except UsageError as refused:
                print(f"{parallel:<6}{method:<18}{refused.message}")
    tasks = [{"what": "tape", "plan": plan.as_dict()} for plan in plans]
    with tempfile.TemporaryDirectory() as folder:
        (answers,) = run([(2, tasks)], Path(folder))
    print(f"{'':<24}{'estimated MiB':>15}{'recorded MiB':>15}{'error %':>10}")
    for plan, (found, _) in zip(plans, answers, strict=True):
        estimated, recorded = memory(work_out(plan)).peak.size, peak(Tape(**found)).size
        row = f"{estimated / 2**20:>15.3f}{recorded / 2**20:>15.3f}"
        row += f"{100 * (estimated / recorded - 1):>10.4f}"
        print(f"{plan.parallel:<6}{plan.method:<18}{row}", flush=True)


if __name__ == "__main__":
    main()
