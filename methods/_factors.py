"""Factors of a dense matrix, for methods that start from one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor as TorchTensor


def balanced(dense: TorchTensor, rank: int, alpha: float) -> tuple[TorchTensor, TorchTensor]:
    """A (rank × columns) and B (rows × rank); (alpha / rank) B A is the best such product.

    Both carry the square root of the singular values: conditioning is best when balanced.
    """
    import torch

    left, values, right = torch.linalg.svd(dense.float(), full_matrices=False)
    root = (values[:rank] * (rank / alpha)).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root
