"""The synthesized tape against the traced one, and the traced one against the CPU's own record.

    python benchmarks/accuracy.py [--plans 320] [--seed 0] [--processes 2] [--csv FILE]
    python benchmarks/accuracy.py --real [--model 60m] [--csv FILE]

The first draws plans from the whole matrix: method, model, checkpointing, attention, precision,
what the loop keeps, optimizer. The second runs each method for real on the CPU. Both print a table
and write a CSV; exit 1 where a bound is missed.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

MATRIX: dict[str, tuple[Any, ...]] = {
    "checkpointing": ("none", "full"),
    "attention": ("sdpa", "sdpa", "eager", "math"),
    "dtype": ("bf16", "bf16", "amp-bf16", "fp32"),
    "zero_grad": ("none", "none", "zero"),
    "keep_logits": (False, False, True),
    "optimizer_impl": ("", "", "foreach", "loop"),
    "state_dtype": ("", "", "", "fp32", "8bit"),
    "per_layer_update": (None, None, None, True),
    "freeze_rest": (False, False, False, True),
    "grad_accum": (1, 1, 2),
    "loss": ("standard", "standard", "chunked"),
    "allocator": ("default", "expandable"),
    "rows": ("packed", "packed", "packed", "padded", "packed-isolated"),
}
MODELS = ("9m", "60m", "350m", "1b", "7b")
BATCHES = ((1, 256), (4, 256), (16, 256), (2, 1024), (1, 2048))
BOUNDS = {"median": 0.003, "worst": 0.01, "phase": 0.95}
REAL_BOUND = 0.001
_TOO_LONG = 2**20  # positions × seq_len per micro-batch of eager attention


def plans(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """That many different plans, each method in turn."""
    from effprof import registry
    from effprof.errors import EffprofError
    from effprof.plan import Plan

    draw = random.Random(seed)
    seen: set[str] = set()
    for method in itertools.cycle(registry.names()):
        if len(seen) >= count:
            return
        for _ in range(50):
            batch, length = draw.choice(BATCHES)
            values = {"model": draw.choice(MODELS), "method": method}
            values |= {"micro_batch": batch, "seq_len": length}
            values |= {name: draw.choice(choices) for name, choices in MATRIX.items()}
            if length > 1024:  # the presets end there
                values["model"] = draw.choice(("qwen2-0.5b", "qwen2-1b"))
            try:
                plan = Plan(**values)
            except EffprofError:
                continue
            if str(plan.as_dict()) not in seen:
                seen.add(str(plan.as_dict()))
                yield plan.as_dict()
                break


def against_trace(values: dict[str, Any]) -> dict[str, Any]:
    """One plan estimated and traced."""
    from effprof.estimator.estimate import estimate
    from effprof.plan import from_dict
    from effprof.tracer.trace import trace

    plan = from_dict(values)
    began = time.perf_counter()
    estimated = estimate(plan).memory
    seconds = time.perf_counter() - began
    traced = trace(plan)
    found = traced.memory
    assert found.reserved is not None
    assert estimated.reserved is not None
    return {
        **{name: values[name] for name in ("model", "method", "micro_batch", "seq_len", *MATRIX)},
        "estimated": estimated.peak.size,
        "traced": found.peak.size,
        "error": estimated.peak.size / found.peak.size - 1,
        "reserved_error": estimated.reserved / found.reserved - 1,
        "estimated_at": f"{estimated.peak.update} {estimated.peak.phase}",
        "traced_at": f"{found.peak.update} {found.peak.phase}",
        "events": len(found.tape.events),
        "estimate_seconds": round(seconds, 3),
        "trace_seconds": round(traced.seconds, 2),
    }


def against_record(values: dict[str, Any]) -> dict[str, Any]:
    """One plan traced and run for real on the CPU."""
    sys.path.insert(0, "tests")
    from helpers import record

    from effprof import tape as tapes
    from effprof.plan import from_dict
    from effprof.tracer.trace import trace

    plan = from_dict(values)
    traced, recorded = trace(plan).memory.peak, tapes.peak(record(plan))
    return {
        "method": plan.method,
        "dtype": plan.dtype,
        "checkpointing": plan.checkpointing,
        "traced": traced.size,
        "recorded": recorded.size,
        "error": traced.size / recorded.size - 1,
        "traced_at": f"{traced.update} {traced.phase}",
        "recorded_at": f"{recorded.update} {recorded.phase}",
    }


def real_plans(model: str) -> Iterator[dict[str, Any]]:
    from effprof import registry
    from effprof.plan import Plan

    for method in registry.names():
        yield Plan(model=model, method=method, micro_batch=4, device="cpu").as_dict()


def run(work: Any, tasks: list[dict[str, Any]], processes: int) -> list[dict[str, Any]]:
    """Every task, two at a time, with progress on stderr."""
    context = multiprocessing.get_context("spawn")
    rows = []
    with context.Pool(processes, maxtasksperchild=40) as pool:
        for number, row in enumerate(pool.imap_unordered(work, tasks), 1):
            rows.append(row)
            sys.stderr.write(f"\r{number}/{len(tasks)} worst {_worst(rows):.3%} ")
    sys.stderr.write("\n")
    return rows


def _worst(rows: Iterable[dict[str, Any]]) -> float:
    return max(abs(row["error"]) for row in rows)


def write(rows: list[dict[str, Any]], path: str) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def show(rows: list[dict[str, Any]]) -> bool:
    """The table; whether every bound holds."""
    print(f"{'':28}{'plans':>6}{'median':>10}{'worst':>10}{'phase':>8}{'reserved':>10}")
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups["all"].append(row)
        for name in ("model", "dtype", "attention", "checkpointing", "loss", "state_dtype"):
            groups[f"{name} {row[name]}"].append(row)
    for name, members in groups.items():
        _line(name, members)
    print("\nworst ten")
    for row in sorted(rows, key=lambda one: -abs(one["error"]))[:10]:
        print(
            f"{row['error']:+.3%}",
            {k: v for k, v in row.items() if k in ("model", "method", *MATRIX)},
        )
        print("        ", row["estimated_at"], "|", row["traced_at"])
    for model in MODELS:
        times = [row["trace_seconds"] for row in rows if row["model"] == model]
        if times:
            print(
                f"trace {model}: median {statistics.median(times):.1f} s, most {max(times):.1f} s"
            )
    median, same = _summary(rows)
    return (
        median <= BOUNDS["median"] and _worst(rows) <= BOUNDS["worst"] and same >= BOUNDS["phase"]
    )


def _summary(rows: list[dict[str, Any]]) -> tuple[float, float]:
    same = sum(row["estimated_at"].split()[1] == row["traced_at"].split()[1] for row in rows)
    return statistics.median(abs(row["error"]) for row in rows), same / len(rows)


def _line(name: str, rows: list[dict[str, Any]]) -> None:
    median, same = _summary(rows)
    reserved = statistics.median(abs(row["reserved_error"]) for row in rows)
    print(f"{name:28}{len(rows):6}{median:10.4%}{_worst(rows):10.3%}{same:8.1%}{reserved:10.2%}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=int, default=320)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--model", default="60m")
    parser.add_argument("--csv", default="")
    options = parser.parse_args()
    if options.real:
        rows = run(against_record, list(real_plans(options.model)), 1)
        for row in sorted(rows, key=lambda one: one["method"]):
            print(
                f"{row['method']:20}{row['traced'] / 2**20:12.3f}"
                f"{row['recorded'] / 2**20:12.3f} MiB"
                f"{row['error']:+10.4%}  {row['traced_at']} | {row['recorded_at']}"
            )
        good = _worst(rows) <= REAL_BOUND
    else:
        rows = run(against_trace, list(plans(options.plans, options.seed)), options.processes)
        good = show(rows)
    write(rows, options.csv or ("accuracy_real.csv" if options.real else "accuracy.csv"))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
