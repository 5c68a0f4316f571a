"""A run at one instant, copied into host memory beside the training."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effprof.measure import host
from effprof.trainer.optimizer import MethodOptimizer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

FILES = ("model.safetensors", "optimizer.safetensors")


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
    model: nn.Module,
    optimizer: MethodOptimizer,
    state: Mapping[str, Any],
    old: Snapshot,
    mesh: DeviceMesh | None = None,
) -> Snapshot:
    """Copy what this process's part of a checkpoint holds, into the memory of an ``old`` one where
    shapes agree. Shards stay shards, of a ``mesh`` of the processes' CPUs.

    On a GPU it only queues the copies: the next update's kernels come after them.
    """
    native = native_tensors(model)
    tensors, table = _flatten(optimizer.state_dict())
    tensors |= {f"rng.{kind}": value for kind, value in _random_states(model).items()}
    document = json.loads(json.dumps({**state, "optimizer": table}))
    files = {
        name: {
            key: _copied(tensor, old.files.get(name, {}).get(key), mesh)
            for key, tensor in content.items()
        }
        for name, content in zip(FILES, (native, tensors), strict=True)
    }
    snapshot = Snapshot(files, document)
    if any(t.is_cuda for t in model.parameters()):
        snapshot.ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        snapshot.ready.record()
    return snapshot


def _copied(tensor: Tensor, before: Tensor | None, mesh: DeviceMesh | None) -> Tensor:
    if hasattr(tensor, "to_local"):
        from effprof.trainer.sharding import resembling

        assert mesh is not None
        shard = None if before is None else before.to_local()  # type: ignore[attr-defined]
        return resembling(tensor, _copied(tensor.to_local(), shard, None), mesh)
    if before is None or before.shape != tensor.shape or before.dtype != tensor.dtype:
        before = host_buffer(tensor)
    return before.copy_(tensor, non_blocking=tensor.is_cuda)


def host_buffer(tensor: Tensor) -> Tensor:
    """Host memory for a tensor: of a GPU's page-locked, where there is room for that, so that the
    copy runs beside the training. torch takes a power of two for each and gives none back.
    """
    if tensor.is_cuda and 4 * tensor.nbytes < host.available():
        with contextlib.suppress(RuntimeError):  # the driver has a limit of its own
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _random_states(model: nn.Module) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if any(parameter.is_cuda for parameter in model.parameters()):
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Go on with the random numbers that a checkpoint holds."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def native_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer once, tied ones under their first name."""
    persistent = model.state_dict().keys()
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach() for name, tensor in named.items() if name in persistent}


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state_dict as tensors by ``index.name`` and the rest, which JSON holds."""
    tensors = {
        f"{index}.{name}": tensor
        for index, one in state["state"].items()
        for name, tensor in one.items()
    }
    return tensors, {key: value for key, value in state.items() if key != "state"}
