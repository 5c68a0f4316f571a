"""Norms of gradients and of what an update changed, without a wait per parameter."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

SAMPLE = 2**16  # numbers of each tensor that are compared before and after


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients together, on their device."""
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return nn.utils.get_total_norm(found) if found else torch.zeros(())


class UpdateNorm:
    """The 2-norm of an update, from evenly spaced numbers of each tensor: all where it has no more
    than ``SAMPLE``, else as many, their squares multiplied by what they stand for.

    Between ``begin`` and ``end`` it holds at most ``SAMPLE`` numbers per tensor.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        taken = [one for one in parameters if one.is_floating_point()]
        self._tensors = [(one, -(-one.numel() // SAMPLE)) for one in taken]
        self._before: list[Tensor] = []

    @torch.no_grad()
    def begin(self) -> None:
        """Keep the sample of the weights as they are."""
        self._before = [one.view(-1)[::every].clone() for one, every in self._tensors]

    @torch.no_grad()
    def end(self) -> Tensor:
        """The norm of what changed since ``begin``."""
        changes = [
            (one.view(-1)[::every].float() - before.float()).mul_(math.sqrt(every))
            for (one, every), before in zip(self._tensors, self._before, strict=True)
        ]
        self._before = []
        return nn.utils.get_total_norm(changes)
