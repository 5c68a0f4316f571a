"""One training step, the same for a run, a probe and a benchmark."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from effprof.errors import EffprofError
from effprof.plan import Plan
from effprof.trainer.batch import Batch
from effprof.trainer.layer import DTYPES
from effprof.trainer.loss import chunked_loss
from effprof.trainer.optimizer import MethodOptimizer

if TYPE_CHECKING:
    from effprof.trainer.distributed import Engine


def training_step(
    model: nn.Module,
    optimizer: MethodOptimizer,
    micro_batches: Sequence[Batch],
    plan: Plan,
    *,
    before_update: Callable[[Tensor], bool] = lambda loss: True,
    scaler: torch.amp.GradScaler | None = None,
    on_phase: Callable[[str], None] = lambda phase: None,
    run: MicroStep | None = None,
    engine: Engine | None = None,
    targets: int | None = None,
) -> Tensor:
    """One optimizer update.

    Returns the loss, a mean over every target of the update, without a sync.

    Each micro-batch weighs by its targets, so accumulation equals one large batch.
    ``before_update`` is called with the loss when all gradients are there (unscaled where a
    ``scaler`` scaled the loss), and says whether to update. ``on_phase`` is told forward, backward
    and update as they begin. ``run`` stands in for ``micro_step``; ``engine`` is there where
    several processes make the update, each with micro-batches of its own, which have ``targets``
    together.
    """
    if engine is not None:
        loss = _on_several(engine, model, micro_batches, targets, plan, on_phase, scaler)
        _update(loss, optimizer, plan, before_update, scaler, on_phase)
        engine.updated()
        return loss
    micro_batches = [batch for batch in micro_batches if batch.targets]
    targets = sum(batch.targets for batch in micro_batches)
    check_targets(targets)
    run = run or functools.partial(micro_step, scaler=scaler)
    total: Tensor | None = None
    for batch in micro_batches:
        loss = run(model, batch, plan, batch.targets / targets, on_phase)
        total = loss if total is None else total + loss
        del loss
    assert total is not None
    _update(total, optimizer, plan, before_update, scaler, on_phase)
    return total


def check_targets(targets: int) -> None:
    """Raise EffprofError where an update has none: its loss would be no number."""
    if not targets:
        raise EffprofError(
            "An update's rows hold nothing to predict.", "Use a longer --seq-len or other --rows."
        )


def _on_several(
    engine: Engine,
    model: nn.Module,
    batches: Sequence[Batch],
    targets: int | None,
    plan: Plan,
    on_phase: Callable[[str], None],
    scaler: torch.amp.GradScaler | None,
) -> Tensor:
    """Every process's micro-steps, weighed by the targets of all of them."""
    losses = []
    shares = engine.shares(batches, targets)
    batches = [batch if batch.targets else _with_a_target(batch) for batch in batches]
    for number, (batch, share) in enumerate(zip(batches, shares, strict=True), 1):
        with engine.micro_step(last=number == len(batches)):
            losses.append(micro_step(model, batch, plan, share, on_phase, scaler, engine.module))
    engine.reduced()
    return engine.total(sum(losses[1:], losses[0]))


def _with_a_target(batch: Batch) -> Batch:
    """A micro-batch with nothing to predict, whose share is 0, made such that its loss is a number:
    this process must not leave the others alone.
    """
    labels = batch.labels.clone()
    labels[0, 1] = batch.ids[0, 1]
    return dataclasses.replace(batch, labels=labels)


def _update(
    total: Tensor,
    optimizer: MethodOptimizer,
    plan: Plan,
    before_update: Callable[[Tensor], bool],
    scaler: torch.amp.GradScaler | None,
    on_phase: Callable[[str], None],
) -> None:
    on_phase("update")
    if scaler is not None:
        scaler.unscale_(optimizer)
    if before_update(total):
        scaler.step(optimizer) if scaler is not None else optimizer.step()
    if scaler is not None:
        scaler.update()
    optimizer.zero_grad(set_to_none=plan.zero_grad == "none")


MicroStep = Callable[[nn.Module, Batch, Plan, float, Callable[[str], None]], Tensor]


def micro_step(
    model: nn.Module,
    batch: Batch,
    plan: Plan,
    share: float | Tensor,
    on_phase: Callable[[str], None],
    scaler: torch.amp.GradScaler | None = None,
    wrapped: nn.Module | None = None,
) -> Tensor:
    """Forward and backward of one micro-batch, whose loss counts for ``share`` of the update's.

    Returns that part of the loss, not scaled. ``wrapped`` is the model as several processes run it.
    """
    on_phase("forward")
    output = forward(model, batch, plan) if wrapped is None else wrapped(batch)
    loss = output.loss
    if isinstance(share, Tensor) or share != 1:
        loss = loss * share
    kept = output if plan.keep_logits else None
    del output
    on_phase("backward")
    backward(loss if scaler is None else scaler.scale(loss), plan)
    del kept
    return cast("Tensor", loss.detach())


def forward(model: nn.Module, batch: Batch, plan: Plan) -> Any:
    """The model's output (its loss alone where that is chunked) under the plan's precision and
    attention.
    """
    kind = batch.ids.device.type
    amp = torch.autocast(kind, dtype=DTYPES[plan.compute_dtype], enabled=plan.autocast)
    with amp, _attention(plan), _whole_rows(plan):
        if plan.loss == "chunked":
            return chunked_loss(model, batch, plan)
        return model(
            input_ids=batch.ids, labels=batch.labels, position_ids=batch.positions, use_cache=False
        )


def backward(loss: Tensor, plan: Plan) -> None:
    """Gradients of a loss; a checkpointed layer runs again here, with the attention it ran with."""
    with _attention(plan):
        loss.backward()  # type: ignore[no-untyped-call]


def _attention(plan: Plan) -> contextlib.AbstractContextManager[None]:
    if plan.attention != "math":
        return contextlib.nullcontext()
    return cast(contextlib.AbstractContextManager[None], sdpa_kernel(SDPBackend.MATH))


@contextlib.contextmanager
def _whole_rows(plan: Plan) -> Iterator[None]:
    """transformers looks whether positions begin anew within a row, and waits for the GPU to see:
    it is told, where the plan knows.
    """
    from transformers import masking_utils

    found = masking_utils.find_packed_sequence_indices
    if plan.rows != "packed-isolated" and plan.attention_mask == "none":
        masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = found


def forward_loss(model: nn.Module, batch: Batch, plan: Plan) -> Tensor:
    """The mean loss over a micro-batch's targets."""
    return cast("Tensor", forward(model, batch, plan).loss)


class Whole(nn.Module):
    """A model with its loss, so that whatever wraps it sees one forward."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.model, self.plan = model, plan

    def forward(self, batch: Batch) -> Any:
        return forward(self.model, batch, self.plan)
