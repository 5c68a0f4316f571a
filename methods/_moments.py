"""Adam's moments as GaLore and its kin use them: corrected in the step size, not in the moments."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor as TorchTensor


def advance(
    first: TorchTensor, second: TorchTensor, gradient: TorchTensor, betas: tuple[float, ...]
) -> None:
    """Both moving averages by one gradient, in place."""
    beta1, beta2 = betas
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)


def direction(first: TorchTensor, second: TorchTensor, eps: float) -> TorchTensor:
    """m / (sqrt(v) + eps), one new tensor."""
    import torch

    root = second.sqrt().add_(eps)
    return torch.div(first, root, out=root)


def correction(betas: tuple[float, ...], count: int) -> float:
    """What bias correction multiplies onto the step size in update ``count`` (1 is the first)."""
    beta1, beta2 = betas
    return float((1 - beta2**count) ** 0.5 / (1 - beta1**count))
