"""The language-model loss without its logits: a few rows of them at a time.

torch 2.13's own ``linear_cross_entropy`` does the same, but returns a bf16 loss for bf16 inputs
(8.5 for 8.31); this one sums in fp32 as transformers' standard loss does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from effprof.plan import Plan
from effprof.trainer.batch import IGNORED, Batch


@dataclass(frozen=True, slots=True)
class LossOnly:
    """What stands for a model's output where there are no logits."""

    loss: Tensor


def chunked_loss(model: nn.Module, batch: Batch, plan: Plan) -> LossOnly:
    """The mean cross entropy of a micro-batch's targets, ``plan.loss_rows`` positions at a time.

    The head's gradient is summed chunk by chunk in the head's dtype: in bf16 that rounds it by
    about one per cent (Frobenius) over sixty chunks, where one product rounds it by 0.2.
    """
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    hidden = decoder(
        input_ids=batch.ids, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    shifted = nn.functional.pad(batch.labels, (0, 1), value=IGNORED)[:, 1:].flatten()
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    rows, targets = plan.loss_rows, max(batch.targets, 1)
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    with torch.autocast(hidden.device.type, enabled=False):
        flat = hidden.flatten(0, 1).to(dtype)
        wanted = torch.is_grad_enabled()  # always off inside
        z_loss = plan.z_loss if model.training else 0.0
        loss = _ChunkedCrossEntropy.apply(flat, head, shifted, targets, rows, wanted, z_loss)  # type: ignore[no-untyped-call]
    return LossOnly(cast("Tensor", loss))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass over chunks of rows, in forward.

    Hidden states are positions × width in the compute dtype, the head vocabulary × width. Where
    nothing needs a gradient none is formed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        count: int,
        rows: int,
        wanted: bool,
        z_loss: float,
    ) -> Tensor:
        needs_hidden, needs_head = (wanted and needed for needed in ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_head = torch.zeros_like(head) if needs_head else None
        weight = head.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = (hidden[part] @ weight.t()).float()
            needed = needs_hidden or needs_head
            total += _softmax_(logits, targets[part], count, z_loss, gradient=needed)
            d_logits = logits.to(hidden.dtype)
            del logits
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[part])
            if d_head is not None and head.dtype == hidden.dtype:
                d_head.addmm_(d_logits.t(), hidden[part])
            elif d_head is not None:
                d_head += d_logits.t() @ hidden[part]
            del d_logits
        ctx.gradients = d_hidden, d_head
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (d_hidden, d_head), ctx.gradients = ctx.gradients, (None, None)
        for gradient in (d_hidden, d_head):
            if gradient is not None:
                gradient.mul_(upstream[0])  # fp32: a share of an update is no number of bf16's
        return d_hidden, d_head, None, None, None, None, None


def _softmax_(
    logits: Tensor, targets: Tensor, count: int, z_loss: float, *, gradient: bool
) -> Tensor:
    """The summed loss of rows × vocabulary logits over ``count``; they become its gradient.

    With ``z_loss`` z, z log² Z is added per target (PaLM, arXiv 2204.02311, section 5).
    """
    wanted = targets != IGNORED
    places = targets.clamp(min=0)[:, None]
    highest = logits.amax(dim=1, keepdim=True)
    logits -= highest
    chosen = logits.gather(1, places)[:, 0]
    sums = logits.exp_().sum(dim=1)
    weights = wanted.to(logits.dtype).div_(count)
    scale = weights / sums
    loss = ((sums.log() - chosen) * weights).sum()
    if z_loss:
        partition = sums.log().add_(highest[:, 0])
        loss += (partition.square() * weights).sum() * z_loss
        scale *= 1 + 2 * z_loss * partition
    if gradient:
        logits *= scale[:, None]
        logits.scatter_add_(1, places, -weights[:, None])
    return loss
