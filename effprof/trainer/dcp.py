"""Checkpoints that every process writes its part of, through torch.distributed.checkpoint.

DCP plans who writes what and who reads what. The files are safetensors as its own
HuggingFaceStorageWriter lays them out and its HuggingFaceStorageReader reads them (offsets in each
file's header), written here because that writer holds a file's bytes a second time before it
writes them. DCP's default writer would leave a pickle, ``.metadata``; nothing here reads one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from effprof.files import cannot_write, digest
from effprof.trainer import checkpoint
from effprof.trainer.capture import Snapshot, native_tensors, set_random_states
from effprof.trainer.checkpoint import Keep
from effprof.trainer.optimizer import MethodOptimizer

_STATE = re.compile(r"(\d+|rng)\.(.+)")  # the name of what is no tensor of the model


class _File(NamedTuple):
    """What a process writes: where, and its SHA-256 once it is there."""

    folder: Path
    name: str
    sum: str = ""


class _Writer(StorageWriter):
    """One file per process in a folder with a temporary name; process 0 puts it in its place."""

    def __init__(self, run: Path, document: Mapping[str, Any], keep: Keep) -> None:
        self.run, self.document, self.keep = run, document, keep
        self.final = checkpoint.place(run, document["step"])
        self.temporary: Path | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A writer is used once."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Process 0 alone, before anything is written: the folder, and a name for each file."""
        self.temporary = checkpoint.begun(self.final)
        names = (f"shard-{n:05d}-of-{len(plans):05d}.safetensors" for n in range(1, len(plans) + 1))
        return [
            dataclasses.replace(plan, storage_data=_File(self.temporary, name))
            for plan, name in zip(plans, names, strict=True)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Every process: its own file, flushed, with its checksum."""
        done: Future[list[WriteResult]] = Future()
        tensors = {
            item.index.fqn: cast("Tensor", planner.resolve_data(item)).detach()
            for item in plan.items
        }
        offsets = {
            item.index.fqn: {SAVED_OFFSETS_KEY: list(item.tensor_data.chunk.offsets)}
            for item in plan.items
            if item.tensor_data is not None
        }
        assert tensors.keys() == offsets.keys(), "tensors only, each in one piece"
        file: _File = plan.storage_data
        if tensors:
            path = file.folder / file.name
            save_file(tensors, path, {"format": "pt", CUSTOM_METADATA_KEY: json.dumps(offsets)})
            checkpoint.flush(path)
            file = file._replace(sum=digest(path))
        done.set_result([WriteResult(item.index, 0, file) for item in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Process 0 alone, when every file is written."""
        assert self.temporary is not None
        files = [cast("_File", one[0].storage_data) for one in results if one]
        sums = {file.name: file.sum for file in files}
        checkpoint.commit(self.run, self.temporary, self.document, sums, self.keep)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


def write(run: Path, snapshot: Snapshot, keep: Keep, group: dist.ProcessGroup) -> None:
    """Write every process's part of a snapshot as checkpoint ``step`` of a run; called by all of
    them, with a group in which nothing else is said meanwhile.

    Raises EffprofError on each where any cannot write; older checkpoints stay.
    """
    writer = _Writer(run, snapshot.document, keep)
    tensors = {name: one for file in snapshot.files.values() for name, one in file.items()}
    if dist.get_rank(group):  # a random state is of one process: the first
        tensors = {name: one for name, one in tensors.items() if not name.startswith("rng.")}
    try:
        save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as failed:
        if writer.temporary is not None:
            shutil.rmtree(writer.temporary, ignore_errors=True)
        problem = next(iter(failed.failures.values()))[0]
        if isinstance(problem, OSError | SafetensorError):
            raise cannot_write(writer.final, problem) from None
        raise problem from None


def restore(
    path: Path, state: Mapping[str, Any], model: nn.Module, optimizer: MethodOptimizer | None
) -> None:
    """Load this process's part of a checkpoint, however many processes wrote it.

    Raises EffprofError where it does not fit the model.
    """
    found = _contents(path)
    wanted = native_tensors(model)
    own = {name: tuple(one.size) for name, one in found.items() if not _STATE.match(name)}
    checkpoint.check_fit(path, own, wanted)
    values: dict[int, dict[str, Tensor]] = {}
    random: dict[str, Tensor] = {}
    if optimizer is not None:
        for key in found.keys() - own.keys():
            index, name = cast("re.Match[str]", _STATE.match(key)).groups()
            size, dtype = found[key].size, found[key].properties.dtype
            if index == "rng":
                wanted[key] = random[name] = torch.empty(size, dtype=dtype)
                continue
            room = optimizer.room(int(index), name, size, dtype)
            if room is not None:
                wanted[key] = values.setdefault(int(index), {})[name] = room
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it is
        load(wanted, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    if optimizer is not None:
        set_random_states(random)
        optimizer.load_state_dict({**state["optimizer"], "state": values})


def _contents(path: Path) -> dict[str, TensorStorageMetadata]:
    """What a checkpoint's files say that they hold, by name."""
    metadata = HuggingFaceStorageReader(str(path)).read_metadata()
    return cast("dict[str, TensorStorageMetadata]", metadata.state_dict_metadata)
