"""Checkpoints: safetensors and JSON only, whole or not there, checksummed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from effprof.errors import EffprofError
from effprof.files import cannot_write, digest
from effprof.trainer.optimizer import MethodOptimizer

PREFIX = "checkpoint-"
_FILES = ("model.safetensors", "optimizer.safetensors")


def save(
    run: Path, model: nn.Module, optimizer: MethodOptimizer, state: Mapping[str, Any], keep: int
) -> Path:
    """Write checkpoint ``state["step"]`` of a run and delete all but the ``keep`` newest.

    The folder is written under a temporary name, flushed and renamed. Raises EffprofError when it
    cannot be written; older checkpoints stay.
    """
    final = run / f"{PREFIX}{state['step']:08d}"
    temporary = run / f".{final.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_file(_contiguous(native_tensors(model)), temporary / _FILES[0])
        tensors, table = _flatten(optimizer.state_dict())
        save_file(_contiguous({**tensors, "rng": torch.get_rng_state()}), temporary / _FILES[1])
        sums = {name: digest(temporary / name) for name in _FILES}
        document = {**state, "optimizer": table, "sha256": sums}
        document["sha256"]["state"] = _state_digest(document)
        (temporary / "state.json").write_text(json.dumps(document), encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            _flush(path)
        aside = run / f".{final.name}.old"
        if final.exists():  # a resumed run that reached the same step again
            final.rename(aside)
        temporary.rename(final)
        _flush(run)
        shutil.rmtree(aside, ignore_errors=True)
    except (OSError, SafetensorError) as problem:
        shutil.rmtree(temporary, ignore_errors=True)
        raise cannot_write(final, problem) from None
    leftovers = run.glob(f".{PREFIX}*")  # of processes that were killed while they wrote
    for old in (*_found(run)[keep:], *leftovers):
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest(
    run: Path, on_damaged: Callable[[Path], None] = lambda path: None
) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint with its state; ``on_damaged`` hears of those passed over.

    Returns None where there is no checkpoint. Raises EffprofError where there are some but none is
    good.
    """
    found = _found(run)
    for path in found:
        state = _checked(path)
        if state is not None:
            return path, state
        on_damaged(path)
    if found:
        raise EffprofError(
            f"Every checkpoint in {str(run)!r} is damaged.",
            "Start again with another --out folder.",
        )
    return None


def restore(
    path: Path, state: Mapping[str, Any], model: nn.Module, optimizer: MethodOptimizer | None
) -> None:
    """Load a checkpoint into a model and its optimizer, exactly as they were.

    Raises EffprofError.
    """
    load_native(path, model)
    if optimizer is None:
        return
    tensors = load_file(path / _FILES[1])
    torch.set_rng_state(tensors.pop("rng"))
    table = dict(state["optimizer"])
    values: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        values.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({**table, "state": values})


@torch.no_grad()
def load_native(path: Path, model: nn.Module) -> None:
    """A model's tensors in the method's own form.

    Raises EffprofError where they do not fit the model.
    """
    loaded, own = load_file(path / _FILES[0]), native_tensors(model)
    if loaded.keys() != own.keys() or any(loaded[k].shape != own[k].shape for k in own):
        raise EffprofError(
            f"{str(path)!r} was written by another plan.", "Resume with the run's own run.toml."
        )
    for name, tensor in loaded.items():
        own[name].copy_(tensor)


def native_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer once, tied ones under their first name."""
    persistent = model.state_dict().keys()
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach() for name, tensor in named.items() if name in persistent}


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state_dict as tensors by ``index.name`` and the rest, which JSON holds."""
    tensors = {
        f"{index}.{name}": tensor
        for index, one in state["state"].items()
        for name, tensor in one.items()
    }
    return tensors, {key: value for key, value in state.items() if key != "state"}


def _found(run: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((p for p in run.glob(f"{PREFIX}*") if p.is_dir()), reverse=True)


def _checked(path: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        sums = state["sha256"]
        good = all(digest(path / name) == sums[name] for name in _FILES)
        good = good and sums.pop("state") == _state_digest(state)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return state if good else None


def _state_digest(state: Mapping[str, Any]) -> str:
    """The SHA-256 of a state's own content, its own sum left out."""
    sums = {name: value for name, value in state["sha256"].items() if name != "state"}
    text = json.dumps({**state, "sha256": sums}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
