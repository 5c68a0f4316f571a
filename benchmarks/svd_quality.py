"""Does the randomized refresh cost quality? The final validation loss of short runs, three seeds.

usage: python benchmarks/svd_quality.py [--method galore] [--steps 300]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SEEDS = (0, 1, 2)


def final_loss(method: str, svd: str, seed: int, steps: int, out: Path) -> float:
    """One run's loss over the whole validation split of the built-in text."""
    command = [sys.executable, "-m", "effprof", "train", "--model", "9m", "--method", method]
    command += ["--set", f"svd={svd}", "--set", "refresh=50", "--rank", "32"]
    command += ["--micro-batch", "8", "--seq-len", "64", "--dtype", "fp32", "--device", "cpu"]
    command += ["--steps", str(steps), "--seed", str(seed), "--out", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loss: float = json.loads(done.stdout)["validation"]["loss"]
    return loss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", default="galore")
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    losses: dict[str, list[float]] = {"exact": [], "randomized": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            for svd, found in losses.items():
                out = Path(folder) / f"{svd}-{seed}"
                found.append(final_loss(given.method, svd, seed, given.steps, out))
    print(f"{given.method}, 9m, {given.steps} updates of 8 x 64, refresh every 50, rank 32")
    print(f"{'svd':<12}" + "".join(f"{f'seed {seed}':>10}" for seed in SEEDS) + f"{'mean':>10}")
    for svd, found in losses.items():
        print(f"{svd:<12}" + "".join(f"{x:>10.4f}" for x in (*found, statistics.mean(found))))
    apart = statistics.mean(losses["randomized"]) - statistics.mean(losses["exact"])
    print(
        f"difference of means {apart:+.4f}; seeds' spread {statistics.stdev(losses['exact']):.4f}"
    )


if __name__ == "__main__":
    main()
