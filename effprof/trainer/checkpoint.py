"""Checkpoints: safetensors and JSON only, whole or not there, checksummed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
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
ASIDE = "damaged-"  # before the name of a checkpoint that was passed over
_FILES = ("model.safetensors", "optimizer.safetensors")


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the ``last`` newest, and the ``best`` of least validation loss."""

    last: int = 2
    best: int = 0

    @property
    def most(self) -> int:
        """How many there are at once, the one being written included."""
        return self.last + self.best + 1


@dataclass
class Snapshot:
    """A run at one instant, in host memory; ``files`` are tensors by file name.

    On a GPU the copies are under way until ``ready`` is over.
    """

    files: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    document: dict[str, Any] = field(default_factory=dict)
    ready: torch.cuda.Event | None = None


@torch.no_grad()
def capture(
    model: nn.Module, optimizer: MethodOptimizer, state: Mapping[str, Any], old: Snapshot
) -> Snapshot:
    """Copy what a checkpoint holds, into the memory of an ``old`` one where shapes agree.

    On a GPU it only queues the copies: the next update's kernels come after them.
    """
    native = _whole(native_tensors(model))
    files = {_FILES[0]: _kept(native, old.files.get(_FILES[0], {}))}
    tensors, table = _flatten(optimizer.state_dict())
    tensors |= {f"rng.{kind}": value for kind, value in _random_states(model).items()}
    document = json.loads(json.dumps({**state, "optimizer": table}))
    files[_FILES[1]] = _kept(tensors.items(), old.files.get(_FILES[1], {}))
    snapshot = Snapshot(files, document)
    if any(t.is_cuda for t in model.parameters()):
        snapshot.ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        snapshot.ready.record()
    return snapshot


def _kept(tensors: Iterable[tuple[str, Tensor]], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: _copied(tensor, before.get(key)) for key, tensor in tensors}


def _copied(tensor: Tensor, before: Tensor | None) -> Tensor:
    if before is None or before.shape != tensor.shape or before.dtype != tensor.dtype:
        before = torch.empty(
            tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda
        )
    return before.copy_(tensor, non_blocking=tensor.is_cuda)


def _random_states(model: nn.Module) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if any(parameter.is_cuda for parameter in model.parameters()):
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def write(run: Path, snapshot: Snapshot, keep: Keep) -> Path:
    """Write a snapshot as checkpoint ``step`` of a run, then delete what ``keep`` does not name.

    The folder is written under a temporary name, flushed and renamed. Raises EffprofError when it
    cannot be written; older checkpoints stay.
    """
    if snapshot.ready is not None:
        snapshot.ready.synchronize()
    final = place(run, snapshot.document["step"])
    temporary = run / f".{final.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, tensors in snapshot.files.items():
            save_file(tensors, temporary / name)
        sums = {name: digest(temporary / name) for name in _FILES}
        document = {**snapshot.document, "sha256": sums}
        document["sha256"]["state"] = _state_digest(document)
        (temporary / "state.json").write_text(json.dumps(document), encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            _flush(path)
        temporary.rename(final)
        _flush(run)
    except (OSError, SafetensorError) as problem:
        shutil.rmtree(temporary, ignore_errors=True)
        raise cannot_write(final, problem) from None
    leftovers = run.glob(f".{PREFIX}*")  # of processes that were killed while they wrote
    for old in (*_surplus(run, keep), *leftovers):
        shutil.rmtree(old, ignore_errors=True)
    return final


def set_aside(run: Path, step: int) -> None:
    """Rename checkpoints beyond ``step``: they are damaged, and not to be counted as kept.

    Raises EffprofError.
    """
    for path in _found(run):
        if path.name > place(run, step).name:
            aside = run / f"{ASIDE}{path.name}"
            try:
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
            except OSError as problem:
                raise cannot_write(aside, problem) from None


def place(run: Path, step: int) -> Path:
    """The folder of a run's checkpoint of that step."""
    return run / f"{PREFIX}{step:08d}"


def _surplus(run: Path, keep: Keep) -> list[Path]:
    """Checkpoints that are neither among the newest nor among the best."""
    older = _found(run)[keep.last :]
    losses = {path: loss for path in _found(run) if (loss := _validation_loss(path)) is not None}
    best = sorted(losses, key=lambda path: (losses[path], path))[: keep.best]
    return [path for path in older if path not in best]


def _validation_loss(path: Path) -> float | None:
    try:
        found = json.loads((path / "state.json").read_text(encoding="utf-8"))["validation_loss"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, float) else None


def newest(
    run: Path, on_damaged: Callable[[Path], None] = lambda path: None
) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint with its state; ``on_damaged`` hears of those passed over.

    Returns None where there is no checkpoint. Raises EffprofError where there are some but none is
    good.
    """
    found = _found(run)
    damaged: list[Path] = []
    for path in found:
        state = _checked(path)
        if state is not None:
            for one in damaged:
                on_damaged(one)
            return path, state
        damaged.append(path)
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
    torch.set_rng_state(tensors.pop("rng.cpu"))
    if "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors.pop("rng.cuda"))
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
        mine, wanted = _part(own[name], tensor)
        mine.copy_(wanted)


def _part(own: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """This process's part of a tensor, and the same part of the whole."""
    if not hasattr(own, "to_local"):
        return own, whole
    from effprof.trainer.sharding import part

    return own.to_local(), part(own, whole)


def native_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer once, tied ones under their first name."""
    persistent = model.state_dict().keys()
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach() for name, tensor in named.items() if name in persistent}


def contribute(model: nn.Module, optimizer: MethodOptimizer) -> None:
    """What a process that writes nothing does while another captures: give its shards."""
    for _ in _whole(native_tensors(model)):
        pass
    optimizer.state_dict()


def _whole(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors as wholes, one at a time."""
    for name, tensor in tensors.items():
        yield name, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


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
