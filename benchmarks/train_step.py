"""Our whole step against a plain loop with the other author's optimizer or layer, interleaved.

update_step.py has the updates alone.

usage: python benchmarks/train_step.py [--model 60m] [--micro-batch 2] [--rounds 9] [--only a,b]

A ratio above 1 means ours is faster. Peaks are the CPU allocator's own record of one steady step.
Optimizers are those of galore-torch, apollo-torch, fira and torch; layers (low-rank, LoRA, SLTrain)
are transcribed from their papers' formulas as their releases compute them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from effprof.measure.recorder import CpuRecorder
from effprof.plan import Plan
from effprof.step import work_out
from effprof.tape import peak
from effprof.trainer import synthetic
from effprof.trainer.build import build, skeleton
from effprof.trainer.step import training_step

CPU = torch.device("cpu")
NEVER = 10**9
Run = Callable[[], object]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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


class LowRank(nn.Module):
    """y = s B (A x), two linear layers, as the benchmark's release has them."""

    def __init__(self, linear: nn.Linear, rank: int, base: bool = False) -> None:
        super().__init__()
        self.base = linear.weight.requires_grad_(False) if base else None
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)
        self.scale = 32 / rank

    def forward(self, x: Tensor) -> Tensor:
        low: Tensor = self.up(self.down(x)) * self.scale
        return low if self.base is None else low + nn.functional.linear(x, self.base)


class _SparsePlusLowRank(torch.autograd.Function):
    """W = s B A with values added on a fixed support, rebuilt in backward; the dense gradient is
    formed for the factors and again for the values, as the benchmark's release does.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, values: Tensor, places: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, a, b, values, places)
        ctx.scale = scale
        weight = (b @ a) * scale
        weight.view(-1).scatter_add_(0, places, values)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, values, places = ctx.saved_tensors
        (g,) = gradients
        weight = (b @ a) * ctx.scale
        weight.view(-1).scatter_add_(0, places, values)
        flat, rows = x.flatten(0, -2), g.flatten(0, -2)
        d_x = g @ weight
        d_a = ctx.scale * b.t() @ (rows.t() @ flat)
        d_b = ctx.scale * (rows.t() @ flat) @ a.t()
        d_values = (rows.t() @ flat).view(-1).gather(0, places)
        return d_x, d_a, d_b, d_values, None, None


class SparsePlusLowRank(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int, density: float = 0.03) -> None:
        super().__init__()
        rows, columns = linear.weight.shape
        count = round(density * rows * columns)
        self.a = nn.Parameter(torch.randn(rank, columns) * columns**-0.5)
        self.b = nn.Parameter(torch.randn(rows, rank) * rank**-0.5)
        self.values = nn.Parameter(torch.rand(count) * 1e-2)
        self.register_buffer("places", torch.randperm(rows * columns)[:count].sort()[0])
        self.scale = 32 / rank

    def forward(self, x: Tensor) -> Tensor:
        arguments = (x, self.a, self.b, self.values, self.places, self.scale)
        return _SparsePlusLowRank.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]


def theirs(plan: Plan, make: Callable[[Any], torch.optim.Optimizer], layer: Any = None) -> Run:
    """What anyone would write: the transformers model, their layers, their optimizer."""
    model: Any = skeleton(work_out(Plan(**{**_common(plan), "method": "full"}))).to_empty(
        device="cpu"
    )
    for module in model.modules():
        model._init_weights(module)
    for parent in list(model.modules()) if layer else ():
        for leaf, child in list(parent._modules.items()):
            if leaf in TARGETS:
                setattr(parent, leaf, layer(child))
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = make(model.train())

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


def _common(plan: Plan) -> dict[str, Any]:
    names = ("model", "micro_batch", "dtype", "device")
    return {name: getattr(plan, name) for name in names}


def adamw(model: Any) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=True)


def split(model: Any, **group: Any) -> list[dict[str, Any]]:
    """Parameter groups as those packages want them: targeted matrices with their settings."""
    named = dict(model.named_parameters())
    chosen = [p for name, p in named.items() if name.split(".")[-2] in TARGETS]
    ids = {id(p) for p in chosen}
    return [
        {"params": [p for p in named.values() if id(p) not in ids]},
        {"params": chosen, **group},
    ]


def pairs(common: dict[str, Any]) -> Iterator[tuple[str, Plan, Callable[[Plan], Run]]]:
    """Each method's plan, and the other's step; refreshes fall outside what is timed."""
    from apollo_torch import APOLLOAdamW
    from fira import FiraAdamW
    from galore_torch import GaLoreAdamW

    def plan(method: str, **settings: Any) -> Plan:
        return Plan(method=method, settings=settings, **common)

    yield "full", plan("full"), lambda p: theirs(p, adamw)
    group = {"update_proj_gap": NEVER, "proj_type": "std"}
    yield (
        "galore",
        plan("galore", refresh=NEVER, eps=1e-6),
        lambda p: theirs(
            p, lambda m: GaLoreAdamW(split(m, rank=p.rank, scale=0.25, **group), lr=1e-3)
        ),
    )
    yield (
        "fira",
        plan("fira", refresh=NEVER, eps=1e-6, residual="code"),
        lambda p: theirs(
            p, lambda m: FiraAdamW(split(m, rank=p.rank, alpha=0.25, **group), lr=1e-3)
        ),
    )
    apollo = {**group, "scale": 1.0, "proj": "random", "scale_type": "channel"}
    yield (
        "apollo",
        plan("apollo", refresh=NEVER, eps=1e-6, projector="stored"),
        lambda p: theirs(p, lambda m: APOLLOAdamW(split(m, rank=p.rank, **apollo), lr=1e-3)),
    )
    yield "lowrank", plan("lowrank"), lambda p: theirs(p, adamw, lambda m: LowRank(m, p.rank))
    yield "lora", plan("lora"), lambda p: theirs(p, adamw, lambda m: LowRank(m, p.rank, True))
    yield (
        "sltrain",
        plan("sltrain"),
        lambda p: theirs(p, adamw, lambda m: SparsePlusLowRank(m, p.rank)),
    )


def steady_peak(make: Callable[[], Run]) -> int:
    """Bytes at the peak of the third step, by the allocator's record."""
    recorder = CpuRecorder()
    recorder.start()
    run = make()
    run()
    run()
    recorder.mark("steady", "forward")
    run()
    recorder.stop()
    tape = recorder.tape()
    start = next(event for event, kind, _ in tape.marks if kind == "steady")
    return peak(tape, start=start).size


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="60m")
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    common = {
        "model": given.model,
        "micro_batch": given.micro_batch,
        "dtype": "fp32",
        "device": "cpu",
    }
    threads = torch.get_num_threads()
    print(f"{given.model}, {given.micro_batch} x 256 positions, fp32, {threads} threads")
    head = ("step", "ours s", "theirs s", "ratio", "ours MiB", "theirs MiB", "ratio")
    print("".join(f"{name:>12}" for name in head), flush=True)
    for name, plan, other in pairs(common):
        if given.only and name not in given.only.split(","):
            continue
        found = interleaved({"ours": ours(plan), "theirs": other(plan)}, given.rounds)
        sizes = [steady_peak(lambda p=plan: ours(p)), steady_peak(lambda p=plan, o=other: o(p))]
        mib = [size / 2**20 for size in sizes]
        row = [name, f"{found['ours']:.3f}", f"{found['theirs']:.3f}"]
        row += [f"{found['theirs'] / found['ours']:.2f}", f"{mib[0]:.1f}", f"{mib[1]:.1f}"]
        row += [f"{mib[0] / mib[1]:.3f}"]
        print("".join(f"{value:>12}" for value in row), flush=True)


if __name__ == "__main__":
    main()
