"""Checkpoints written beside the training: the loop copies, a thread writes.

Under FSDP that is so on every process, and the threads talk in a group of their own.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from effprof.trainer import checkpoint
from effprof.trainer.capture import Snapshot, capture
from effprof.trainer.checkpoint import Keep
from effprof.trainer.optimizer import MethodOptimizer
from effprof.trainer.world import PATIENCE


class Saver:
    """Writes a run's checkpoints, one at a time.

    ``save`` waits only for the one before it; ``check``, ``save`` and ``wait`` raise EffprofError
    for a write that failed. ``seconds`` is the longest that one took.
    """

    def __init__(
        self, run: Path, keep: Keep, device: torch.device, *, sharded: bool = False
    ) -> None:
        self.run, self.keep = run, keep
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if sharded else None
        self._mesh = DeviceMesh.from_group(self._group, "cpu") if self._group else None
        self.seconds = 0.0
        # CUDA's current device is a thread's own: the first one's, unless it is set.
        begin = None
        if device.type == "cuda":
            begin = functools.partial(torch.cuda.set_device, torch.cuda.current_device())
        self._thread = ThreadPoolExecutor(1, "checkpoint", begin)
        self._writing: Future[None] | None = None
        self._buffers = Snapshot()

    def save(self, model: nn.Module, optimizer: MethodOptimizer, state: Mapping[str, Any]) -> Path:
        """Copy the run as it is now and begin to write it; the place it will have."""
        self.wait()
        self._buffers = capture(model, optimizer, state, self._buffers, self._mesh)
        self._writing = self._thread.submit(self._write, self._buffers)
        return checkpoint.place(self.run, state["step"])

    def _write(self, snapshot: Snapshot) -> None:
        began = time.monotonic()
        if snapshot.ready is not None:
            snapshot.ready.synchronize()
        if self._group is None:
            checkpoint.write(self.run, snapshot, self.keep)
        else:
            from effprof.trainer import dcp

            dcp.write(self.run, snapshot, self.keep, self._group)
        self.seconds = max(self.seconds, time.monotonic() - began)

    def check(self) -> None:
        """Hear of a write that failed, without waiting for one under way."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until what was saved is on the disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """End the thread, whatever became of its work."""
        self._thread.shutdown(wait=True)
