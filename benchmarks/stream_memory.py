"""A large jsonl.gz streamed and tokenised: what the process holds while it goes.

usage: python benchmarks/stream_memory.py FOLDER [--gigabytes 2] [--seconds 0]

Writes FOLDER/large.jsonl.gz (text of that size before compression) unless it is there, then draws
micro-batches from it, to its end or for so many seconds, printing the resident set as it grows, or
does not.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import time
from pathlib import Path

import psutil
import torch

from effprof.plan import Plan
from effprof.trainer.batches import StreamBatches
from effprof.trainer.corpus import corpus, standard_library
from effprof.trainer.streams import DatasetCorpus
from effprof.trainer.tokenizer import tokenizer

MIB = 2**20
_EVERY = 30  # seconds


def write(path: Path, size: int) -> None:
    """Documents of real text in a random order, again and again, until they are that large."""
    texts = [text[:20_000] for text in standard_library().documents("train")]
    chance, written = random.Random(0), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
        while written < size:
            row = json.dumps({"text": f"{written}\n{chance.choice(texts)}"}) + "\n"
            written += file.write(row)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--seconds", type=float, default=0)
    given = parser.parse_args()
    path = given.folder / "large.jsonl.gz"
    if not path.exists():
        write(path, round(given.gigabytes * 1e9))
    print(f"{path}: {path.stat().st_size / MIB:,.0f} MiB compressed")
    plan = Plan(model="60m", device="cpu")
    texts = corpus(str(path), stream=True)
    assert isinstance(texts, DatasetCorpus)
    words = tokenizer(texts, plan.architecture.vocab, None)
    stream = StreamBatches(texts, words, plan, "train", torch.device("cpu"))
    process, began, told, tokens = psutil.Process(), time.monotonic(), 0.0, 0
    print(f"{'seconds':>8}{'tokens':>14}{'tokens/s':>12}{'resident MiB':>14}")
    before = 0
    while before <= stream.documents:  # which begin again with the next pass
        before = stream.documents
        tokens += stream.next().ids.numel()
        spent = time.monotonic() - began
        ended = stream.documents < before or 0 < given.seconds <= spent
        if spent - told > _EVERY or ended:
            told = spent
            resident = process.memory_info().rss / MIB
            rate = tokens / spent
            print(f"{spent:>8.0f}{tokens:>14,}{rate:>12,.0f}{resident:>14,.0f}", flush=True)
        if ended:
            break
    print(f"{before:,} documents")


if __name__ == "__main__":
    main()
