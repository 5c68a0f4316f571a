"""Full-rank AdamW: every parameter trained, two moments each.

Decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101, Algorithm 2). torch.optim.AdamW is
hosted as it is wherever moments have the weights' dtype; moments in fp32 beside bf16 weights, which
it refuses, are ``update`` below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from effprof.model import Matrix
from effprof.registry import Clock, Facts, Flops, Group, Tensor

from . import _checks

FACTS = Facts(
    title="Full-rank AdamW",
    summary="every weight trained, two moments per weight",
    paper="arXiv 1711.05101",
    equations="Algorithm 2",
    reference="torch.optim.AdamW",
    deviations=(
        "eps is 1e-8 and weight decay 0, as the benchmark sets them (torch's own decay default is "
        "0.01).",
        "The learning rates by size are effprof's starting points: no published table of the "
        "benchmark's sweep.",
    ),
    lr={"9m": 3e-3, "60m": 2e-3, "130m": 1e-3, "350m": 1e-3, "1b": 5e-4, "7b": 3e-4},
    convention="bf16, 2 B per number: weights + both AdamW moments; no gradients, no activations",
)
TORCH_OPTIMIZER = "AdamW"
IMPLEMENTATIONS = ("fused", "foreach", "loop")
COVERS = ("linear", "embedding", "head", "norm", "bias")


@dataclass(frozen=True)
class Settings:
    """AdamW's settings."""

    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _checks.betas(self.betas)
        _checks.positive("eps", self.eps)
        _checks.not_negative("weight_decay", self.weight_decay)


def state(matrix: Matrix, settings: Settings) -> tuple[Tensor, ...]:
    """Both moments, in the tensor's shape, and torch's step counter."""
    shape = matrix.shape
    return (
        Tensor("step", (), "fp32", "optimizer"),
        Tensor("exp_avg", shape, "state", "optimizer"),
        Tensor("exp_avg_sq", shape, "state", "optimizer"),
    )


def flops(matrix: Matrix, tokens: int, settings: Settings) -> Flops:
    """About twelve operations per number: two moving averages, a root, a quotient, the step."""
    return Flops(elementwise={"adamw": 12 * matrix.numel})


def transient(matrix: Matrix, tokens: int, settings: Settings) -> Mapping[str, tuple[Tensor, ...]]:
    """Of ``update``: the denominator, the step, and the weight in fp32."""
    shape = matrix.shape
    return {
        "update": (
            Tensor("weight_fp32", shape, "fp32", "workspace"),
            Tensor("denominator", shape, "fp32", "workspace"),
            Tensor("step", shape, "fp32", "workspace"),
        )
    }


def torch_settings(settings: Settings) -> dict[str, Any]:
    """The keyword arguments of torch.optim.AdamW."""
    return {
        "betas": tuple(settings.betas),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }


def update(group: Group, clock: Clock, settings: Settings) -> None:
    """AdamW with moments in fp32 whatever the weights' dtype.

    The weight is rounded once per update.
    """
    weight, gradient = group.tensors["weight"], group.gradients["weight"].float()
    first, second = group.state["exp_avg"], group.state["exp_avg_sq"]
    beta1, beta2 = settings.betas
    group.state["step"].add_(1)
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    del gradient
    update_count = clock.update + 1
    correction1, correction2 = 1 - beta1**update_count, 1 - beta2**update_count
    denominator = second.sqrt().div_(correction2**0.5).add_(settings.eps)
    step = (first / denominator).mul_(-clock.lr / correction1)
    if settings.weight_decay:
        step.add_(weight, alpha=-clock.lr * settings.weight_decay)
    weight.copy_(step.add_(weight))
