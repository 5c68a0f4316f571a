"""Our steps against plain references: one process, interleaved, medians, as ratios of throughput.

usage: python benchmarks/train_step.py [--model 60m] [--micro-batch 2] [--rounds 15]
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import nn

from effprof import registry
from effprof.model import architecture
from effprof.plan import Plan
from effprof.registry import Clock, Group
from effprof.step import work_out
from effprof.trainer import probe_child as probe
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
        batch = probe.random_batch(plan, CPU)
        model(input_ids=batch.ids, labels=batch.labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(plan: Plan) -> Run:
    """effprof's own step of a plan."""
    model, optimizer = build(plan, lr=1e-3)
    return lambda: training_step(model, optimizer, [probe.random_batch(plan, CPU)], plan)


def galore_pair(size: str, rank: int, dtype: torch.dtype) -> dict[str, Run]:
    """One update of one layer's matrices between refreshes: ours and galore-torch's step()."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from galore_torch import GaLoreAdamW
    half = registry.method("galore").update
    settings = half.Settings(rank=rank, refresh=10**9, eps=1e-6)
    torch.manual_seed(0)
    matrices = architecture(size).layer_matrices()
    groups, parameters = [], []
    for matrix in matrices:
        weight, gradient = torch.randn(matrix.shape).to(dtype), torch.randn(matrix.shape).to(dtype)
        state = {t.name: torch.zeros(t.shape, dtype=dtype) for t in half.state(matrix, settings)}
        groups.append(Group(matrix, {"weight": weight}, {"weight": gradient}, state))
        parameters.append(nn.Parameter(weight.clone()))
        parameters[-1].grad = gradient.clone()
    extra = {"rank": rank, "update_proj_gap": 10**9, "scale": 0.25, "proj_type": "std"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = GaLoreAdamW(
            [{"params": parameters, **extra}], lr=1e-3, no_deprecation_warning=True
        )
    clock = Clock(lr=1e-3)

    def update() -> None:
        with torch.no_grad():
            for group in groups:
                half.update(group, clock, settings)
        clock.update += 1

    return {"ours": update, "galore-torch": reference.step}


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
    for size, rank, name in (("60m", 128, "fp32"), ("60m", 128, "bf16"), ("350m", 256, "fp32")):
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
        pair = interleaved(galore_pair(size, rank, dtype), given.rounds)
        label = f"galore update {size} r={rank} {name}"
        print(f"{label:<34}{pair['ours']:>9.4f}{pair['galore-torch'] / pair['ours']:>8.3f}")


if __name__ == "__main__":
    main()
