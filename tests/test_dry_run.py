"""What a run would take, said before it starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_cli, small

from effprof import registry
from effprof.estimator.memory import evaluation
from effprof.step import work_out
from effprof.tape import peak

SMALL = ("--micro-batch", "2", "--seq-len", "32", "--dtype", "fp32", "--device", "cpu")


def dry_run(tiny: str, texts: Path | str, out: Path, *more: str) -> tuple[int, str, str]:
    return run_cli(
        *("train", "--dry-run", "--model", tiny, "--data", texts, "--out", out, *SMALL, *more)
    )


def test_it_says_what_a_run_takes(tiny: str, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, text, _ = dry_run(tiny, texts, out, "--steps", "50", "--grad-accum", "2", "--json")
    assert code == 0
    found = json.loads(text)
    assert (found["steps"], found["tokens"]) == (50, 50 * 2 * 2 * 32)
    assert found["data"]["files"] == len(list(texts.iterdir()))
    memory = found["memory"]
    assert memory["update"] == found["estimate"]["memory"]["peak_allocated"]
    assert (
        memory["needed"] == max(memory["update"], memory["evaluation"]) + memory["checkpoint_copy"]
    )
    assert not out.exists()
    code, text, _ = dry_run(tiny, texts, out, "--steps", "50")
    assert code == 0
    assert "Nothing was started" in text
    assert max(map(len, text.splitlines())) <= 100


def test_its_disk_is_what_the_run_writes(tiny: str, texts: Path, tmp_path: Path) -> None:
    """Two checkpoints and the model, within the room asked for and above half of it."""
    more = ("--steps", "6", "--save-every", "2", "--method", "galore")
    needed = json.loads(dry_run(tiny, texts, tmp_path / "run", *more, "--json")[1])["disk"][
        "needed"
    ]
    arguments = ("train", "--model", tiny, "--data", texts, "--out", tmp_path / "run", *SMALL)
    assert run_cli(*arguments, *more)[0] == 0
    tensors = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.safetensors"))
    assert 0.5 * needed < tensors < needed


@pytest.mark.parametrize("method", registry.names())
def test_memory_of_a_validation(method: str, tiny: str) -> None:
    """Estimated as the CPU's allocator records it, states of every method held."""
    assert evaluation_error(small(tiny, method, micro_batch=4, seq_len=64)) < 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "amp-bf16"},
        {"checkpointing": "full", "attention": "eager"},
        {"loss": "chunked", "dtype": "bf16"},
        {"zero_grad": "zero"},
    ],
    ids=str,
)
def test_memory_of_a_validation_in_other_plans(changes: dict[str, Any], tiny: str) -> None:
    assert evaluation_error(small(tiny, "lowrank", micro_batch=4, seq_len=64, **changes)) < 1e-3


def evaluation_error(plan: Any) -> float:
    from effprof.measure.recorder import CpuRecorder
    from effprof.trainer import synthetic
    from effprof.trainer.build import build
    from effprof.trainer.evaluate import evaluate

    recorder = CpuRecorder()
    recorder.start()
    model, optimizer = build(plan)
    synthetic.one_update(model, optimizer, plan, torch.device("cpu"))
    optimizer.seek(1)
    recorder.mark("evaluation", "forward")
    evaluate(model, [synthetic.random_batch(plan, torch.device("cpu"))], plan)
    recorder.stop()
    tape = recorder.tape()
    start = next(event for event, kind, _ in tape.marks if kind == "evaluation")
    real = peak(tape, start=start).size
    return abs(evaluation(work_out(plan)).peak.size / real - 1)


def test_what_stops_a_run_stops_it(
    tiny: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from effprof.measure.device import CpuMeter

    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    assert dry_run(tiny, texts, tmp_path / "used", "--steps", "5")[0] == 2
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jsonl").write_text("{}")
    code, _, err = dry_run(tiny, tmp_path / "bad", tmp_path / "run", "--steps", "5")
    assert (code, "a.jsonl" in err) == (1, True)
    code, _, err = dry_run(tiny, texts, tmp_path / "run", "--steps", "5", "--tokenizer", "nowhere")
    assert (code, "nowhere" in err) == (2, True)
    monkeypatch.setattr(CpuMeter, "free", lambda self: 1000)
    code, _, err = dry_run(tiny, texts, tmp_path / "run", "--steps", "5")
    assert (code, "--force" in err) == (3, True)
    assert dry_run(tiny, texts, tmp_path / "run", "--steps", "5", "--force")[0] == 0
