"""Runs of several processes: what they save, who may go on from it, and what ends them."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers import small
from processes import losses, run, train

from effprof.errors import EffprofError, UsageError
from effprof.trainer import checkpoint, launch
from effprof.trainer.preflight import _ready
from effprof.trainer.run import make

# Under FSDP: torch's own rule on shards, a rule at its owner, merges of whole layers.
METHODS = {"full": {}, "galore": {"refresh": 2}, "lowrank-restarts": {"restart_every": 2}}
STEPS, STOP = 6, 3
Alone = Callable[[str], tuple[Path, list[Any]]]
ROWS = 8  # of an update


def _plan(model: str, method: str, gpus: int, parallel: str | None = None) -> Any:
    several = {"gpus": gpus, "parallel": parallel} if gpus > 1 else {}
    settings = METHODS.get(method, {"switch_every": 2})
    return small(model, method, settings=settings, global_batch=ROWS, **several)


def _task(plan: Any, texts: Path, *out: Path, **more: Any) -> dict[str, Any]:
    common = {"data": str(texts), "steps": STEPS, "log_norms": True}
    common |= {"out": [str(one) for one in out]}
    return {"what": "train", "plan": plan.as_dict(), "more": {**common, **more}}


@pytest.fixture(scope="module")
def several(
    tiny: str, texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[Any, list[Any]], Path]:
    """What four processes found in a few updates of each method and in two runs that a signal
    stops; then what two found that go on with those runs, and with one of their own.
    """
    folder = tmp_path_factory.mktemp("several")
    four: dict[Any, dict[str, Any]] = {
        (parallel, method): {
            "what": "losses",
            "plan": _plan(tiny, method, 4, parallel).as_dict(),
        }
        for parallel in ("ddp", "fsdp")
        for method in METHODS
    }
    two: dict[Any, dict[str, Any]] = {}
    for name in ("ddp", "fsdp"):
        out, again = folder / name, folder / f"{name}-again"
        four[name] = _task(_plan(tiny, "galore", 4, name), texts, out, stop=STOP)
        plan = _plan(tiny, "galore", 2, "fsdp")
        two[again.name] = _task(plan, texts, again, since=str(out), resume=True)
    plan, out = _plan(tiny, "badam", 2, "ddp"), folder / "badam"
    two["badam"] = _task(plan, texts, out, stop=STOP)
    two["badam-again"] = _task(plan, texts, out, resume=True)
    (folder / "other").mkdir()
    two["other"] = _task(plan, texts, out, folder / "other", resume=True)
    typed = ["train", "--model", tiny, "--data", str(texts), "--out", str(folder / "typed")]
    typed += ["--method", "galore", "--set", "refresh=2", "--micro-batch", "2", "--seq-len", "32"]
    typed += ["--dtype", "fp32", "--device", "cpu", "--global-batch", str(ROWS)]
    typed += ["--parallel", "fsdp", "--steps", str(STEPS), "--save-every", "2"]
    found = run([(4, list(four.values())), (2, list(two.values()))], folder, typed)
    return dict(zip([*four, *two], [*found[0], *found[1]], strict=True)), folder


@cache
def _alone(model: str, method: str, texts: Path, folder: Path) -> tuple[Path, list[Any]]:
    """One process's run and its rows."""
    plan = _plan(model, method, 1)
    rows = train(plan, **_task(plan, texts, folder)["more"])["rows"]
    return folder, rows


def _numbers(out: Path, name: str = "loss") -> list[float]:
    return [json.loads(row)[name] for row in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tiny: str, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """What one process does, by method."""
    folder = tmp_path_factory.mktemp("alone")
    return lambda method: _alone(tiny, method, texts, folder / method)


def test_four_processes_train_as_one(several: tuple[Any, Path], tiny: str) -> None:
    """Losses within 1e-4 of one process's at the same global batch, fp32, with restarts and
    refreshes; torch's step counters the same on all, also after a restart.
    """
    wrong = []
    for parallel, method in itertools.product(("ddp", "fsdp"), METHODS):
        found = several[0][parallel, method]
        one = losses(_plan(tiny, method, 1))
        same = all(each["losses"] == found[0]["losses"] for each in found)
        counters = [each["counters"] for each in found] == [one["counters"]] * 4
        near = found[0]["losses"] == pytest.approx(one["losses"], rel=1e-4)
        if not (same and near and counters):
            wrong.append((parallel, method, found, one))
    assert not wrong


def test_two_go_on_where_four_stopped(several: tuple[Any, Path], alone: Alone) -> None:
    """Every row once, in the order of one process; from whole tensors and from shards."""
    one, rows = alone("galore")
    for name in ("ddp", "fsdp"):
        out = several[1] / f"{name}-again"
        before, after = several[0][name], several[0][f"{name}-again"]
        assert [each["code"] for each in before + after] == [143] * 4 + [0] * 2
        for update, wanted in enumerate(rows):
            of = before if update < STOP else after
            found = [row for each in of for row in each["rows"][update % STOP]]
            assert sorted(found) == sorted(wanted), (name, update)
        for number in ("loss", "grad_norm", "update_norm"):
            assert _numbers(out, number) == pytest.approx(_numbers(one, number), rel=1e-4)
        assert (out / "model" / "model.safetensors").is_file()


def test_a_killed_process_costs_a_restart_and_no_loss(
    several: tuple[Any, Path], alone: Alone
) -> None:
    """torchrun's agent starts all again; they go on from the newest checkpoint by themselves."""
    out = several[1] / "typed"
    assert json.loads((out / "summary.json").read_text())["resumed_at"] == 2
    assert not list(out.glob(".checkpoint-*"))  # what it had written by then
    assert _numbers(out) == pytest.approx(_numbers(alone("galore")[0]), rel=1e-4)


def test_shards_are_written_apart_and_read_by_one(
    several: tuple[Any, Path], tiny: str, texts: Path, tmp_path: Path, alone: Alone
) -> None:
    """A file per process, none with much more than its share; one process goes on from them."""
    folder = several[1] / "fsdp" / f"checkpoint-{STOP:08d}"
    files = sorted(folder.glob("*.safetensors"))
    assert [one.name for one in files] == [
        f"shard-0000{n}-of-00004.safetensors" for n in range(1, 5)
    ]
    assert sorted(one.name for one in folder.iterdir()) == [*(f.name for f in files), "state.json"]
    ready = _ready(make(_plan(tiny, "galore", 4, "fsdp"), tmp_path, {"steps": STEPS}))
    sizes = [one.stat().st_size for one in files]
    assert sum(sizes) == pytest.approx(ready.checkpoint, rel=0.02)
    assert max(sizes) == pytest.approx(ready.copy, rel=0.05)
    assert ready.disk_needed > ready.checkpoint > 3 * ready.copy
    shutil.copytree(several[1] / "fsdp", tmp_path / "one")
    plan = _plan(tiny, "galore", 1)
    task = _task(plan, texts, tmp_path / "one", resume=True)["more"]
    assert train(plan, **task)["code"] == 0
    assert _numbers(tmp_path / "one") == pytest.approx(_numbers(alone("galore")[0]), rel=1e-4)


def test_a_shard_that_is_not_the_checkpoints_is_damage(
    several: tuple[Any, Path], tmp_path: Path
) -> None:
    """Changed, missing, or added: DCP would read whatever lies in the folder."""
    newest = f"checkpoint-{STOP:08d}"
    for damage in ("changed", "missing", "added"):
        run = tmp_path / damage
        shutil.copytree(several[1] / "fsdp", run)
        first = next((run / newest).glob("shard-00001*"))
        if damage == "changed":
            content = bytearray(first.read_bytes())
            content[-1] ^= 1
            first.write_bytes(content)
        elif damage == "missing":
            first.unlink()
        else:
            shutil.copy(first, first.with_name("shard-00005-of-00005.safetensors"))
        with pytest.raises(EffprofError, match="damaged"):
            checkpoint.newest(run)


def test_turns_go_on_under_ddp(several: tuple[Any, Path], alone: Alone) -> None:
    """Resumed where another block has its turn than at the start: DDP reduces that one's."""
    found, folder = several
    assert [one["code"] for one in found["badam"] + found["badam-again"]] == [143] * 2 + [0] * 2
    assert _numbers(folder / "badam") == pytest.approx(_numbers(alone("badam")[0]), rel=1e-4)


def test_processes_that_see_different_checkpoints_do_not_start(several: tuple[Any, Path]) -> None:
    for one in several[0]["other"]:
        assert "do not see the same checkpoints" in one["error"]


def test_gpus_are_as_many_as_torchrun_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.with_gpus({"method": "full"}) == {"method": "full", "gpus": 2}
    assert launch.with_gpus({"gpus": 2}) == {"gpus": 2}
    with pytest.raises(UsageError, match="--gpus 4 disagrees with torchrun's 2"):
        launch.with_gpus({"gpus": 4})
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert launch.with_gpus({"gpus": 4}) == {"gpus": 4}
