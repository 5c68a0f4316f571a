"""Estimated tokens per second against what others measured on GPUs.

    python benchmarks/throughput.py measured_gpu.jsonl

One JSON object per line, as for measured_gpu.py. A row is taken where its model is a LLaMA-like
decoder (MPT's two-matrix MLP stands as three of two thirds of the width), nothing is compiled, and
each GPU works on whole layers (data parallel or FSDP: communication is taken to be hidden, which is
said to be so up to 16 GPUs). Prints each row, the median |error| and how many lie within the
interval that ``estimate`` prints. Exit 1 where the median |error| is above 15 %.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from effprof.estimator.estimate import estimate
from effprof.plan import Plan

LIMIT = 0.15
MOST_GPUS = 16
CARDS = {
    "a100_40": "a100-40gb",
    "A100-SXM4-40": "a100-40gb",
    "A100": "a100-80gb",
    "a100": "a100-80gb",
    "H100": "h100-80gb",
    "h100": "h100-80gb",
    "T4": "t4",
}
SOURCES = ("torchtitan", "torchtune README opt", "llm-foundry", "InternEvo", "fitcheck")


def reason(row: dict[str, Any]) -> str:
    """Why a row is left out, or nothing."""
    if not any(name in row["source"] for name in SOURCES):
        return "another program: compiled, tensor-parallel, C, or a variable length"
    if rate(row) is None or not row["seq_len"] or not row["micro_batch"]:
        return "no throughput, or no batch size"
    if row["compile"] is not False or "TP" in str(row["parallelism"]):
        return "compiled, or tensor-parallel"
    if "unpacked" in str(row["notes"]):
        return "rows of varying length"
    if "fp8" in str(row["precision"]) or "float8" in str(row["precision"]):
        return "8-bit products"
    if "selective" in str(row["activation_checkpointing"]) or row["method"] not in ("full", "lora"):
        return "selective checkpointing, or 4-bit weights"
    if "CPU" in str(row["activation_checkpointing"]) or "flex" in str(row["attention"])[:4]:
        return "offloading, or another attention"
    if row["world_size"] and row["world_size"] > MOST_GPUS and "torchtitan" not in row["source"]:
        return f"more than {MOST_GPUS} GPUs"
    return ""


def rate(row: dict[str, Any]) -> float | None:
    """Tokens per second of one GPU."""
    found = row["measured"]
    if found.get("tokens_per_s_per_gpu"):
        return float(found["tokens_per_s_per_gpu"])
    if found.get("tokens_per_s") and row["world_size"]:
        return float(found["tokens_per_s"]) / row["world_size"]
    if found.get("step_ms") and row["seq_len"] and row["micro_batch"]:
        positions = row["seq_len"] * row["micro_batch"] * (row["grad_accum"] or 1)
        return float(positions / found["step_ms"] * 1e3)
    return None


def plan_of(row: dict[str, Any], folder: Path) -> Plan:
    """The nearest plan that effprof can express."""
    arch = row["arch"]

    def pick(*names: str) -> Any:
        return next(arch[name] for name in names if arch.get(name))

    width = pick("intermediate", "intermediate_size")
    config = {
        "model_type": "llama",
        "hidden_size": pick("hidden", "hidden_size"),
        "num_hidden_layers": pick("layers", "num_layers"),
        "num_attention_heads": pick("heads", "num_attention_heads"),
        "num_key_value_heads": pick("kv_heads", "num_kv_heads"),
        "intermediate_size": round(width * 2 / 3) if arch.get("mlp") == "gelu" else width,
        "vocab_size": pick("vocab", "vocab_size"),
        "max_position_embeddings": 1 << 20,
    }
    (folder / "config.json").write_text(json.dumps(config))
    lora: dict[str, Any] = {}
    if row["method"] == "lora":  # fitcheck: transformers 4 builds the mask
        lora = {"method": "lora", "rank": row["rank"], "targets": ("attention",)}
        lora |= {"freeze_rest": True, "dtype": "fp16", "attention_mask": "full"}
    full = str(row["activation_checkpointing"]).startswith("full")
    return Plan(
        model=str(folder),
        micro_batch=row["micro_batch"],
        seq_len=row["seq_len"],
        checkpointing="full" if full else "none",
        attention="eager" if row["attention"] == "eager" else "sdpa",
        gpu=next(card for name, card in CARDS.items() if name in row["gpu"]),
        **lora,
    )


def main() -> int:
    """Print a row for each case and the medians by source."""
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    left: Counter[str] = Counter()
    errors: dict[str, list[float]] = defaultdict(list)
    inside = 0
    for row in map(json.loads, lines):
        why = reason(row)
        if why:
            left[why] += 1
            continue
        measured = rate(row)
        with tempfile.TemporaryDirectory() as folder:
            plan = plan_of(row, Path(folder))
            time = estimate(plan, calibrated=False).time
        assert time is not None
        assert measured is not None
        found = time.positions / time.update
        source = row["source"].partition(" ")[0]
        errors[source].append(found / measured - 1)
        inside += 1 / (1 + time.spread) <= found / measured <= 1 / (1 - time.spread)
        shape = f"{row['micro_batch']} x {row['seq_len']} {plan.checkpointing} {plan.gpu}"
        name = f"{source[:20]:20} {row['model'][:26]:26} {shape:28}"
        print(f"{name} {measured:9.0f} {found:9.0f} {100 * errors[source][-1]:+6.1f}%")
    every = [error for found in errors.values() for error in found]
    for source, found in errors.items():
        middle = 100 * statistics.median(map(abs, found))
        print(f"{source}: {len(found)} rows, median |error| {middle:.1f} %")
    middle = statistics.median(map(abs, every))
    print(f"all: {len(every)} rows, median |error| {100 * middle:.1f} %, ", end="")
    print(f"{inside} inside the printed interval")
    for why, count in left.most_common():
        print(f"left out {count}: {why}")
    return int(middle > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
