"""Every example runs, with tiny settings, and says what its README promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
# Words that each prints, in this order.
SAID = {
    "will-it-fit": ("does not fit by", "fits with", "config.json", "'fits': True"),
    "compare-methods": ("Pareto front", "pareto.html", "rows.csv"),
    "probe-and-validate": ("FITS", "probe.html", "1 of 1 within 1 %", "2 measurements in"),
    "pretrain-on-your-text": ("Validation loss", "run.html", "def main("),
    "own-loop": ("step 99",),
    "hf-trainer": ("updates 60 since the last merge 0",),
    "multi-gpu-slurm": ("8 GPUs, fsdp", "Communication:", "Validation loss", "Hugging Face folder"),
    "paper": (),
    "add-your-own-method": (
        "signum: Signum",
        "1b · signum",
        "signum updates",
        "signum",
        "5 updates",
    ),
}
TINY = ("add-your-own-method", "multi-gpu-slurm")
SMALL = {"STEPS": "5", "SECONDS_EACH": "0"}


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.iterdir()))
def test_it_runs(example: str, tmp_path: Path, tiny: str) -> None:
    folder = EXAMPLES / example
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert f"bash examples/{example}/run.sh" in (folder / "README.md").read_text(encoding="utf-8")
    model = {"MODEL": tiny} if example in TINY else {}
    done = subprocess.run(
        ["bash", str(folder / "run.sh")],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, **SMALL, **model, "PYTHON": sys.executable, "OUT": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    place, printed = 0, " ".join(done.stdout.split())
    for words in SAID.get(example, ()):
        assert words in printed[place:], (words, done.stdout)
        place = printed.index(words, place) + len(words)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    if example == "compare-methods":
        _check_three_files(tmp_path)


def _check_three_files(out: Path) -> None:
    document = json.loads((out / "compare.json").read_text())
    rows = (out / "rows.csv").read_text().splitlines()
    assert len(rows) == 1 + len(document["rows"])
    assert "Pareto front" in (out / "pareto.html").read_text()
