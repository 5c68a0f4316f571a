"""Validation loss: the mean over tokens, and beside it the figure the published tables' code
would print.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from effprof.errors import EffprofError
from effprof.plan import Plan
from effprof.trainer.batch import Batch
from effprof.trainer.step import forward_loss

if TYPE_CHECKING:
    from effprof.trainer.distributed import Engine


@dataclass(frozen=True, slots=True)
class Validation:
    """``loss`` is the mean over ``tokens`` targets, in nats.

    ``lineage_loss`` is what the benchmark's released code reports: the mean of per-batch means
    times K / (K + 1) for K batches, because it counts one batch too many. ``split`` is how many
    micro-batches the whole split has, 0 where it is a stream, of which nobody knows.
    """

    loss: float
    lineage_loss: float
    tokens: int
    batches: int
    split: int = 0

    @property
    def whole(self) -> bool:
        """Whether it is of all of the split."""
        return self.batches == self.split

    @property
    def perplexity(self) -> float:
        return float(torch.tensor(self.loss, dtype=torch.float64).exp())


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    plan: Plan,
    engine: Engine | None = None,
    split: int = 0,
) -> Validation:
    """Loss over validation batches; the model is back in training mode afterwards.

    Raises EffprofError where the split has no target.
    """
    model.eval()
    total, tokens, means = 0.0, 0, []
    try:
        for batch in batches:
            if batch.targets:
                found = forward_loss(model, batch, plan) if engine is None else engine.loss(batch)
                loss = found.double().item()
                total += loss * batch.targets
                tokens += batch.targets
                means.append(loss)
    finally:
        model.train()
        if engine is not None:
            engine.evaluated()
    if not tokens:
        raise EffprofError(
            "The validation split has nothing to predict.", "Give more text with --data."
        )
    count = len(means)
    return Validation(total / tokens, sum(means) / (count + 1), tokens, count, split)
