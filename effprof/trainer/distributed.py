"""What DDP and FSDP2 change in an update that several processes make together."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from effprof.plan import Plan
from effprof.trainer.batch import Batch
from effprof.trainer.optimizer import MethodOptimizer
from effprof.trainer.step import check_targets, forward_loss


class Engine:
    """What several processes change in an update; a subclass per ``--parallel``."""

    factor = 1  # gradients are this many times too small where they are averaged

    def __init__(self, plan: Plan, optimizer: MethodOptimizer, whole: nn.Module) -> None:
        self.plan, self.optimizer, self.module = plan, optimizer, whole
        self.size = dist.get_world_size()
        self._begun = False

    def shares(self, batches: Sequence[Batch], targets: int | None) -> Sequence[float | Tensor]:
        """What each micro-batch's mean loss counts for, so that the update's gradient is that of
        the mean over every process's ``targets``, which are counted where they are not known.

        Raises EffprofError where there are none.
        """
        if targets is not None:
            check_targets(targets)
            return [self.factor * batch.targets / targets for batch in batches]
        own = torch.tensor([float(b.targets) for b in batches], device=batches[0].ids.device)
        total = own.sum()
        dist.all_reduce(total)
        return (own * (self.factor / total)).unbind()

    def micro_step(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """The surroundings of a forward and a backward."""
        return contextlib.nullcontext()

    def reduced(self) -> None:
        """After the last backward: what the wrapper did not reduce."""

    def updated(self) -> None:
        """After the update: other tensors may need a gradient now.

        What layers took from their process's own first rows becomes process 0's.
        """
        if not self._begun and hasattr(self.plan.halves.layer, "LOCAL_START"):
            for buffer in self.optimizer.whole.buffers():
                dist.broadcast(buffer, 0)
        self._begun = True

    def restored(self) -> None:
        """After a checkpoint: other tensors may need a gradient than at the start."""

    def loss(self, batch: Batch) -> Tensor:
        """The mean loss of a batch, without a gradient; the same batch on every process."""
        return forward_loss(self.optimizer.whole.model, batch, self.plan)  # type: ignore[arg-type]

    def evaluated(self) -> None:
        """After an evaluation."""

    def total(self, loss: Tensor) -> Tensor:
        """The update's loss out of every process's part."""
        loss = loss / self.factor
        dist.all_reduce(loss)
        return loss


class Replicas(Engine):
    """DDP: gradients are views of its buckets, all-reduced as backward fills them.

    Where tensors take turns DDP is made anew with those that need a gradient; where each is
    updated in backward its gradient is all-reduced there, without a bucket.
    """

    def __init__(self, plan: Plan, optimizer: MethodOptimizer, whole: nn.Module) -> None:
        super().__init__(plan, optimizer, whole)
        self.whole, self.factor = whole, self.size
        self._wanted: list[bool] = []
        self._reducer: DistributedDataParallel | None = None
        for tensor in (*whole.parameters(), *whole.buffers()):
            dist.broadcast(tensor.detach(), 0)
        if plan.per_layer_update:
            optimizer.reduce = self._mean
        self._wrap()

    def _wrap(self) -> None:
        wanted = [parameter.requires_grad for parameter in self.whole.parameters()]
        if self.plan.per_layer_update or wanted == self._wanted:
            return
        self._wanted, self._reducer = wanted, None
        self.module = self.whole
        if any(wanted):
            self._reducer = DistributedDataParallel(
                self.whole,
                forward_sync_buffers=False,
                gradient_as_bucket_view=True,
                init_sync=False,
            )
            self.module = self._reducer

    def _mean(self, gradient: Tensor) -> None:
        dist.all_reduce(gradient.div_(self.size))

    def micro_step(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        if last or self._reducer is None:
            return contextlib.nullcontext()
        return cast("contextlib.AbstractContextManager[None]", self._reducer.no_sync())

    def reduced(self) -> None:
        if not self.plan.per_layer_update:
            for gradient in self.optimizer.integer_gradients():
                self._mean(gradient)

    def updated(self) -> None:
        super().updated()
        self._wrap()

    def restored(self) -> None:
        self._wrap()


class Sharded(Engine):
    """FSDP2: every micro-step's gradients are reduce-scattered, so that none is held whole."""

    def loss(self, batch: Batch) -> Tensor:
        return cast("Tensor", self.module(batch).loss)

    def evaluated(self) -> None:
        cast("FSDPModule", self.module).reshard()  # the root stays gathered until a backward


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor as a whole, from every process's part. Called by all of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def engine(plan: Plan, optimizer: MethodOptimizer) -> Engine | None:
    """What runs a plan's updates on several processes; None on one."""
    if plan.parallel == "none":
        return None
    if plan.parallel == "ddp":
        return Replicas(plan, optimizer, optimizer.whole)
    return Sharded(plan, optimizer, optimizer.whole)
