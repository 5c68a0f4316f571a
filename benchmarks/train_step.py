"""Our steps against a plain loop: one process, interleaved, medians, as ratios of throughput.

update_step.py has the updates alone, beside their authors'.

usage: python benchmarks/train_step.py [--model 60m] [--micro-batch 2] [--rounds 15]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from effprof.plan import Plan
from effprof.step import work_out
from effprof.trainer import synthetic
from effprof.trainer.build import build, skeleton
from effprof.trainer.step import training_step

CPU = torch.device("cpu")
Run = Callable[[], object]


def interleaved(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Median seconds of each, taken in turn so that the machine's moods fall on all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for turn in range(rounds):
        order = list(runs) if turn % 2 else list(reversed(runs))
        for name in order:
            begin = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def plain_loop(plan: Plan) -> Run:
    """What anyone would write: the transformers model and torch's fused AdamW."""
    model = skeleton(work_out(plan)).to_empty(device="cpu")
    model.load_state_dict(build(plan)[0].state_dict(), strict=False)
    for module in model.modules():
        model._init_weights(module)  # type: ignore[operator]
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)

    def step() -> None:
        batch = synthetic.random_batch(plan, CPU)
        model(input_ids=batch.ids, labels=batch.labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(plan: Plan) -> Run:
    """effprof's own step of a plan."""
    model, optimizer = build(plan, lr=1e-3)
    return lambda: training_step(model, optimizer, [synthetic.random_batch(plan, CPU)], plan)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="60m")
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    common = {
        "model": given.model,
        "micro_batch": given.micro_batch,
        "dtype": "fp32",
        "device": "cpu",
    }
    full = Plan(method="full", **common)
    lowrank = Plan(method="lowrank", **common)
    found = interleaved(
        {"plain": plain_loop(full), "full": ours(full), "lowrank": ours(lowrank)}, given.rounds
    )
    threads = torch.get_num_threads()
    print(f"{given.model}, {given.micro_batch} x 256 positions, fp32, {threads} threads")
    print(f"{'step':<34}{'seconds':>9}{'ratio':>8}")
    print(f"{'plain loop, fused AdamW':<34}{found['plain']:>9.3f}")
    ratio = found["plain"] / found["full"]
    print(f"{'ours, full (plain / ours)':<34}{found['full']:>9.3f}{ratio:>8.3f}")
    row = f"ours, lowrank r={lowrank.rank} (full / lowrank)"
    print(f"{row:<34}{found['lowrank']:>9.3f}{found['full'] / found['lowrank']:>8.3f}")


if __name__ == "__main__":
    main()
