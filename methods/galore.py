"""GaLore: AdamW on the gradient projected onto its leading singular vectors, renewed every
``refresh`` updates.

Zhao et al., arXiv 2403.03507, Algorithm 2. The back-projection and the weight's step are one
product added in place, so no matrix-sized temporary exists outside a refresh.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from effprof.errors import unknown
from effprof.model import Matrix
from effprof.registry import Clock, Facts, Flops, Group, Tensor

from . import _checks

if TYPE_CHECKING:
    from torch import Tensor as TorchTensor

FACTS = Facts(
    title="GaLore",
    summary="AdamW in the gradient's leading subspace, renewed by SVD",
    paper="arXiv 2403.03507",
    equations="Algorithm 2; projection rule 'std' of the release",
    reference="jiaweizzhao/GaLore galore_torch (PyPI galore-torch 1.0)",
    deviations=(
        "eps is 1e-8 as in the paper's pseudo-code; the release uses 1e-6 (--set eps=1e-6).",
        "A square matrix is projected from the right, as the release does; the paper projects it "
        "from the left "
        "(--set side=left).",
        "rank 512 at 1b is the paper's table; the released script passes 1024.",
        "Embeddings, head and norms get AdamW in the same run, as in the release.",
    ),
    defaults={
        "60m": {"rank": 128, "refresh": 200},
        "130m": {"rank": 256, "refresh": 200},
        "350m": {"rank": 256, "refresh": 200},
        "1b": {"rank": 512, "refresh": 200},
        "7b": {"rank": 1024, "refresh": 500},
    },
    lr={"60m": 1e-2, "1b": 1e-2, "7b": 5e-3},
    convention="bf16, 2 B per number: weights + projector + both moments of the projected "
    "gradient; AdamW for the rest",
)
COVERS = ("linear",)
PERIODS = ("refresh",)
SIDES = ("std", "reverse_std", "left", "right")


@dataclass(frozen=True)
class Settings:
    """GaLore's settings."""

    rank: int
    scale: float = 0.25
    refresh: int = 200
    side: str = "std"
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _checks.positive("rank", self.rank)
        _checks.positive("scale", self.scale)
        _checks.positive("refresh", self.refresh)
        if self.side not in SIDES:
            raise unknown("side", self.side, SIDES)
        _checks.betas(self.betas)
        _checks.positive("eps", self.eps)
        _checks.not_negative("weight_decay", self.weight_decay)


def _from_right(rows: int, columns: int, side: str) -> bool:
    """Whether the gradient G is projected as G Pᵀ (from the right) or as Pᵀ G."""
    if side == "std":
        return rows >= columns
    if side == "reverse_std":
        return rows < columns
    return side == "right"


def _shapes(matrix: Matrix, settings: Settings) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of the projector and of the projected gradient."""
    _checks.rank_below(matrix, settings.rank)
    if _from_right(matrix.rows, matrix.columns, settings.side):
        return (settings.rank, matrix.columns), (matrix.rows, settings.rank)
    return (matrix.rows, settings.rank), (settings.rank, matrix.columns)


def state(matrix: Matrix, settings: Settings) -> tuple[Tensor, ...]:
    """The projector and both moments of the projected gradient."""
    projector, projected = _shapes(matrix, settings)
    return (
        Tensor("projector", projector, "weight", "optimizer"),
        Tensor("exp_avg", projected, "state", "optimizer"),
        Tensor("exp_avg_sq", projected, "state", "optimizer"),
    )


def flops(matrix: Matrix, tokens: int, settings: Settings) -> Flops:
    """Project and project back; AdamW on the projected gradient; a thin SVD per refresh.

    The SVD is 14 q p² + 8 p³ for sides p <= q (Golub & Van Loan, R-SVD with both factors).
    """
    product = 2 * matrix.numel * settings.rank
    _, projected = _shapes(matrix, settings)
    p, q = matrix.shorter, matrix.longer
    return Flops(
        update={"project": product, "back": product},
        elementwise={"adamw": 12 * projected[0] * projected[1]},
        periodic={"svd": (14 * q * p**2 + 8 * p**3) / settings.refresh},
    )


def transient(matrix: Matrix, tokens: int, settings: Settings) -> Mapping[str, tuple[Tensor, ...]]:
    """Two tensors of the projected shape in an update; in a refresh what torch has for an SVD.

    That is a copy of the fp32 gradient beside the factors, as recorded on the CPU; what LAPACK or
    cuSOLVER allocates inside is not here.
    """
    _, projected = _shapes(matrix, settings)
    p, q = matrix.shorter, matrix.longer
    return {
        "update": (
            Tensor("denominator", projected, "state", "workspace"),
            Tensor("step", projected, "state", "workspace"),
        ),
        "refresh": (
            Tensor("gradient_fp32", (matrix.rows, matrix.columns), "upcast", "workspace"),
            Tensor("left", (matrix.rows, p), "fp32", "workspace"),
            Tensor("right", (p, matrix.columns), "fp32", "workspace"),
            Tensor("svd_copy", (p, q), "fp32", "workspace"),
            Tensor("singular_values", (p,), "fp32", "workspace"),
        ),
    }


def _basis(gradient: TorchTensor, settings: Settings) -> TorchTensor:
    """The leading singular vectors of one gradient, orthonormal, in its dtype."""
    import torch

    left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
    from_right = _from_right(gradient.shape[0], gradient.shape[1], settings.side)
    basis: TorchTensor = right[: settings.rank] if from_right else left[:, : settings.rank]
    return basis.to(gradient.dtype)


def update(group: Group, clock: Clock, settings: Settings) -> None:
    """One update of a rows × columns weight.

    The basis is renewed when ``refresh`` divides the update count.
    """
    weight, gradient = group.tensors["weight"], group.gradients["weight"]
    projector, first, second = (group.state[k] for k in ("projector", "exp_avg", "exp_avg_sq"))
    if clock.update % settings.refresh == 0:
        projector.copy_(_basis(gradient, settings))
    right = _from_right(gradient.shape[0], gradient.shape[1], settings.side)
    projected = gradient @ projector.t() if right else projector.t() @ gradient
    projected = projected.to(first.dtype)
    beta1, beta2 = settings.betas
    first.lerp_(projected, 1 - beta1)
    second.mul_(beta2).addcmul_(projected, projected, value=1 - beta2)
    del projected
    count = clock.update + 1
    step_size = clock.lr * settings.scale * (1 - beta2**count) ** 0.5 / (1 - beta1**count)
    step = (first / second.sqrt().add_(settings.eps)).to(weight.dtype)
    factors = (step, projector) if right else (projector, step)
    weight.addmm_(*factors, alpha=-step_size)
    if settings.weight_decay:
        weight.mul_(1 - clock.lr * settings.weight_decay)
