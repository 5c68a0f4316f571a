"""fp32 to bf16 so that the mean is kept: up or down with the probability of the nearer part."""

from __future__ import annotations

import torch
from torch import Tensor

_NAN = 0x7FC00000  # above infinity, and far enough below 2**31
_LOW = 2**16  # what bf16 cuts from the bits of an fp32 number


def round_stochastically(wide: Tensor, into: Tensor, seed: int) -> None:
    """Round ``wide`` (fp32, changed) into ``into`` (bf16): each number to one of its neighbours,
    the nearer the likelier, so that the expectation is the number itself. Infinities stay.

    Adding a uniform integer below 2**16 to the bits and cutting them there does it (Zamirai et al.,
    arXiv 2010.06192, section 4).
    """
    generator = torch.Generator(wide.device).manual_seed(seed)
    noise = torch.randint(
        _LOW, wide.shape, dtype=torch.int32, device=wide.device, generator=generator
    )
    bits = wide.view(torch.int32).clamp_(max=_NAN)  # CUDA's NaN plus noise would overflow to zero
    bits.add_(noise).bitwise_and_(-_LOW)
    into.copy_(wide)
