"""Killed outright, at random instants and before every step of writing a checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

DRIVER = Path(__file__).with_name("killing.py")
KILLS = 8
# A projector that is refreshed, factors that are merged and pruned, a layer with masks.
METHODS = {
    "galore": "refresh=3",
    "relora": "restart_every=4",
    "sltrain-restarts": "restart_every=3",
}


def test_killed_runs_end_as_the_uninterrupted(tiny: str, texts: Path, tmp_path: Path) -> None:
    """Twenty-four kills at random, and one before each step of writing: nothing saved is lost."""
    common = ["train", "--model", tiny, "--data", str(texts), "--device", "cpu", "--dtype", "fp32"]
    common += ["--micro-batch", "2", "--seq-len", "32", "--save-every", "1", "--steps", "24"]
    cases = {
        method: [KILLS, *common, "--method", method, "--set", change, "--eval-every", "5"]
        for method, change in METHODS.items()
    }
    restarts = ["--method", "lowrank-restarts", "--set", "restart_every=3", "--steps", "8"]
    cases["each"] = [0, *common, *restarts, "--keep-last", "1"]
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(tmp_path), json.dumps(cases)],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    logs = "".join(path.read_text()[-2000:] for path in tmp_path.glob("*/log"))
    assert done.returncode == 0, done.stderr[-2000:] + logs
    found = json.loads(done.stdout)
    each = found.pop("each")
    assert found == {name: {"kills": KILLS, "same": True, "losses": 24} for name in METHODS}
    assert each["kills"] >= 20
    assert each["same"]
