"""A full-rank run of `effprof train`, trained again by a plain loop: transformers' model, torch's
AdamW, the same rows in the same order from the same initial weights.

usage: python benchmarks/plain_training.py RUN [--rest-lr 1e-2 ...]

The first line must agree with the run: nothing of effprof's step, optimizer or validation is in the
loop. Each --rest-lr trains once more with that peak learning rate for what is no matrix of a layer
(embedding, head, norms), as methods that scale a matrix's update do by their `scale`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from effprof.plan import Plan, from_dict
from effprof.trainer import schedule
from effprof.trainer.batches import Batches
from effprof.trainer.build import build
from effprof.trainer.corpus import corpus
from effprof.trainer.folder import read_tables
from effprof.trainer.rows import Rows, rows

CPU = torch.device("cpu")


def train(plan: Plan, asked: dict[str, Any], text: Rows, config: Any, rest_lr: float) -> Any:
    """The model after the run's updates: AdamW with two groups."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    start, _ = build(plan, "cpu", seed=asked["seed"])
    model.load_state_dict(start.state_dict())
    inner, rest = [], []
    for name, weight in model.named_parameters():
        (inner if ".layers." in name and weight.ndim == 2 else rest).append(weight)
    peaks = (asked["lr"], rest_lr)
    groups = [{"params": some} for some in (inner, rest)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    batches = Batches(text, plan, asked["seed"], CPU)
    for update in range(asked["steps"]):
        ids = batches.next().ids
        for group, lr in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = lr * schedule.factor(
                asked["schedule"], update, asked["warmup"], asked["steps"]
            )
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def perplexity(model: Any, text: Rows) -> float:
    """Of the whole validation split: the mean loss over its targets."""
    model.eval()
    total = count = 0.0
    for batch in text.evaluation(len(text), CPU):
        targets = batch.ids[:, 1:].numel()
        total += model(input_ids=batch.ids, labels=batch.ids).loss.item() * targets
        count += targets
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("run", type=Path)
    parser.add_argument("--rest-lr", type=float, nargs="*", default=[])
    given = parser.parse_args()
    tables = read_tables(given.run / "run.toml")
    plan, asked = from_dict(tables["plan"]), tables["train"]
    assert (plan.method, plan.dtype, plan.grad_accum) == ("full", "fp32", 1)
    words = AutoTokenizer.from_pretrained(given.run / "tokenizer")
    text = {
        split: rows(corpus(asked.get("data")), words, plan, split)
        for split in ("train", "validation")
    }
    config = AutoConfig.from_pretrained(given.run)
    told = json.loads((given.run / "summary.json").read_text())["validation"]["perplexity"]
    print(f"effprof: lr {asked['lr']:g} throughout, perplexity {told:.4f}", flush=True)
    for rest_lr in (asked["lr"], *given.rest_lr):
        begin = time.perf_counter()
        found = perplexity(train(plan, asked, text["train"], config, rest_lr), text["validation"])
        print(
            f"plain: layers' matrices {asked['lr']:g}, the rest {rest_lr:g}: perplexity "
            f"{found:.4f} ({found / told - 1:+.4%}), {time.perf_counter() - begin:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
