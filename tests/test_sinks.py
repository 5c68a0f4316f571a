"""Metrics beside metrics.jsonl, and what the exported folder says of itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import run_cli

SMALL = ("--micro-batch", "2", "--seq-len", "32", "--dtype", "fp32", "--device", "cpu")


def train(tiny: str, texts: Path, out: Path, *more: str) -> tuple[int, str, str]:
    return run_cli("train", "--model", tiny, "--data", texts, "--out", out, *SMALL, *more)


def test_tensorboard_has_every_update(tiny: str, texts: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    assert train(tiny, texts, out, "--steps", "5", "--log", "tensorboard")[0] == 0
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    found = {one.step: one.value for one in events.Scalars("loss")}
    assert found == {row["step"]: pytest.approx(row["loss"]) for row in rows}


class Tracker:
    """A module as wandb is: it keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def init(self, **options: Any) -> None:
        self.calls.append(("init", options))

    def log(self, numbers: dict[str, float], step: int) -> None:
        if step == 4:
            raise ConnectionError("no network")
        self.calls.append(("log", (step, numbers["loss"])))

    def finish(self) -> None:
        self.calls.append(("finish", None))


def test_a_tracker_that_fails_does_not_stop_the_run(
    tiny: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline unless told otherwise; what it is told until it fails."""
    tracker = Tracker()
    spec = SimpleNamespace(name="wandb", loader=None)
    monkeypatch.setitem(sys.modules, "wandb", tracker)  # type: ignore[arg-type]
    monkeypatch.setattr(tracker, "__spec__", spec, raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    code, _, err = train(tiny, texts, tmp_path / "run", "--steps", "6", "--log", "wandb")
    assert code == 0
    assert "--log wandb stopped: ConnectionError" in err
    kinds = [kind for kind, _ in tracker.calls]
    assert kinds == ["init", "log", "log", "log"]
    assert tracker.calls[0][1]["mode"] == "offline"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 6


def test_what_is_not_there_is_said(
    tiny: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = train(tiny, texts, tmp_path / "run", "--steps", "2", "--log", "trackio")
    assert (code, "pip install trackio" in err) == (2, True)
    code, _, err = train(tiny, texts, tmp_path / "run", "--steps", "2", "--log", "tensorbord")
    assert (code, "tensorboard" in err) == (2, True)


def test_the_model_card(tiny: str, texts: Path, tmp_path: Path) -> None:
    """Plan, data, tokens, losses, memory: as summary.json has them, under valid front matter."""
    import yaml

    out = tmp_path / "run"
    code, shown, _ = train(tiny, texts, out, "--steps", "5", "--method", "galore")
    assert code == 0
    assert "hf upload" in shown
    summary = json.loads((out / "summary.json").read_text())
    _, front, text = (out / "model" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["tags"] == ["effprof", "galore"]
    assert "datasets" not in yaml.safe_load(front)
    for value in ("GaLore", f"{summary['validation']['loss']:.4f}", str(texts), "refresh 200"):
        assert value in text
    assert "memory estimated" in text
    assert "memory measured" in text
