"""Probe against estimate on this CPU: every method at 9m and 60m, micro-batch 4.

usage: python benchmarks/probe_accuracy.py [--models 9m 60m] [--dtype bf16 fp32] [--seconds 10]
"""

from __future__ import annotations

import argparse

from effprof import registry
from effprof.plan import Plan
from effprof.prober.compare import compare
from effprof.prober.run import probe


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["9m", "60m"])
    parser.add_argument("--dtype", nargs="+", default=["bf16"])
    parser.add_argument("--seconds", type=float, default=10.0)
    given = parser.parse_args()
    head = ("estimated MiB", "measured MiB", "error %", "phase", "s/update", "spread %")
    print(f"{'plan':<22}" + "".join(f"{name:>15}" for name in head))
    for model in given.models:
        for dtype in given.dtype:
            for method in registry.names():
                plan = Plan(model=model, method=method, dtype=dtype, micro_batch=4, device="cpu")
                found = compare(probe(plan, seconds=given.seconds))
                bucket = next(b for b in found.at_peak if b.name == "peak_allocated")
                assert bucket.error is not None
                times = found.measured["step_seconds"]
                row = f"{bucket.estimated / 2**20:>15.3f}{bucket.measured / 2**20:>15.3f}"
                row += f"{100 * bucket.error:>15.4f}{found.measured['memory']['peak_phase']:>15}"
                row += f"{times['median']:>15.3f}{100 * times['spread']:>15.1f}"
                print(f"{f'{model} {method} {dtype}':<22}{row}", flush=True)


if __name__ == "__main__":
    main()
