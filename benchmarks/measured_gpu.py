"""Estimate and trace against peak memory that others measured on GPUs.

    python benchmarks/measured_gpu.py measured_gpu.jsonl [--no-trace] [--csv FILE]

One JSON object per line: model shapes, configuration, what was measured and by which meter. A row
is taken where it ran transformers' own model code on one GPU with what effprof can express; each
other source is counted with the reason it is left out. Errors are predicted over measured. Exit 1
where a row of an exact configuration is beyond 1 %, or more than 0.5 % below.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from effprof.units import GIB

ABOVE, BELOW = 0.01, -0.005
# Habits of the measured loops, from their own code; transformers 4 always builds the mask.
LOOPS: dict[str, dict[str, Any]] = {
    "a6000": {
        "attention_mask": "full",
        "optimizer_impl": "foreach",
        "zero_grad": "zero",
        "keep_logits": True,
        "gpu": "rtx-a6000",
    },
    "fitcheck": {
        "optimizer_impl": "foreach",
        "keep_logits": True,
        "targets": ("attention",),
        "freeze_rest": True,
        "gpu": "t4",
    },
}
ASSUMED = {
    "a6000": "",
    "fitcheck": "adapters in 16 bits inside the layer (measured: peft's, fp32, beside it)",
}
PRECISION = {
    "pure bf16": "bf16",
    "bf16 autocast, fp32 master weights": "amp-bf16",
    "weights fp16, adapters fp32": "fp16",
}


def reason(row: dict[str, Any]) -> str:
    """Why a row is left out, or nothing."""
    if row["id"].partition("-")[0] not in LOOPS:
        return "another model's code, several GPUs, or throughput only"
    if row["method"] not in ("full", "lora"):
        return f"{row['method']}: 4-bit base weights"
    return ""


def config(row: dict[str, Any]) -> dict[str, Any]:
    """A row's shapes as a Hugging Face config.json."""
    arch = row["arch"]

    def pick(*names: str) -> Any:
        return next(arch[name] for name in names if name in arch)

    biased = "qwen2" in row["model"].lower()
    return {
        "model_type": "qwen2" if biased else "llama",
        "hidden_size": pick("hidden", "hidden_size"),
        "num_hidden_layers": pick("layers", "num_layers"),
        "num_attention_heads": pick("heads", "num_attention_heads"),
        "num_key_value_heads": pick("kv_heads", "num_kv_heads"),
        "head_dim": pick("head_dim"),
        "intermediate_size": pick("intermediate", "intermediate_size"),
        "vocab_size": pick("vocab", "vocab_size"),
        "tie_word_embeddings": pick("tied_embeddings", "tie_word_embeddings"),
        "max_position_embeddings": 131072,
    }


def values(row: dict[str, Any], model: str) -> dict[str, Any]:
    """The plan of a row."""
    dtype = PRECISION.get(row["precision"], "amp-bf16")
    found = {
        "model": model,
        "method": row["method"],
        "dtype": dtype,
        "micro_batch": row["micro_batch"],
        "seq_len": row["seq_len"],
        "attention": row["attention"].split()[0],
        "checkpointing": "none" if row["activation_checkpointing"] == "none" else "full",
        **LOOPS[row["id"].partition("-")[0]],
    }
    if "shim" in row["measured"].get("sdpa_backend", ""):
        del found["gpu"]  # heads were repeated by hand for a fused kernel, which a T4 has not
    return found | ({"rank": row["rank"]} if row["rank"] else {})


def predict(row: dict[str, Any], folder: Path, *, traced: bool) -> dict[str, Any]:
    """A row with both predictions."""
    from effprof.estimator.estimate import estimate
    from effprof.plan import Plan
    from effprof.tracer.trace import trace

    path = folder / row["id"].replace("/", "-")
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config(row)), encoding="utf-8")
    plan = Plan(**values(row, str(path)))
    measured = row["measured"]
    bytes_ = measured.get("raw_bytes") or round(measured["peak_allocated_gib"] * GIB)
    expected = estimate(plan).memory
    found = {"id": row["id"], "confidence": row["confidence"], "measured": bytes_}
    found |= {"estimate": expected.peak.size, "estimate_error": expected.peak.size / bytes_ - 1}
    if traced:
        size = trace(plan).memory.peak.size
        found |= {"trace": size, "trace_error": size / bytes_ - 1}
    if "peak_reserved_gib" in measured:
        reserved = measured["peak_reserved_gib"] * GIB
        assert expected.reserved is not None
        found |= {"reserved": round(reserved), "reserved_error": expected.reserved / reserved - 1}
    return found


def show(rows: list[dict[str, Any]]) -> bool:
    """The table; whether every exact configuration is within its bounds."""
    print(f"{'row':42}{'measured':>11}{'estimate':>10}{'trace':>10}{'reserved':>10}")
    good = True
    source = ""
    for row in rows:
        own = row["id"].partition("-")[0]
        if own != source:
            source = own
            print(f"-- {own}: {ASSUMED[own] or 'exact configuration'}")
        errors = [row.get(f"{name}_error") for name in ("estimate", "trace", "reserved")]
        shown = "".join("          " if e is None else f"{e:+10.3%}" for e in errors)
        print(f"{row['id'][-42:]:42}{row['measured'] / GIB:7.3f} GiB{shown}")
        if not ASSUMED[own]:
            good = good and all(BELOW <= e <= ABOVE for e in errors[:2] if e is not None)
    for own in LOOPS:
        for name in ("estimate", "trace"):
            key = f"{name}_error"
            errors = [abs(r[key]) for r in rows if r["id"].startswith(own) and key in r]
            if errors:
                print(
                    f"{own} {name}: median {statistics.median(errors):.3%}, worst {max(errors):.3%}"
                )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--no-trace", action="store_true")
    parser.add_argument("--csv", default="")
    options = parser.parse_args()
    every = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            predict(row, Path(folder), traced=not options.no_trace)
            for row in every
            if not reason(row)
        ]
    good = show(rows)
    for why, count in Counter(reason(row) for row in every).items():
        if why:
            print(f"left out: {count} rows, {why}")
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, sorted({key for row in rows for key in row}))
            writer.writeheader()
            writer.writerows(rows)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
