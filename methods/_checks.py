"""Checks that several methods share: a setting out of range, a rank the matrix cannot hold."""

from __future__ import annotations

from typing import Any

from effprof.errors import UsageError, unknown
from effprof.model import Matrix


def positive(name: str, value: float) -> None:
    """Raise UsageError unless ``value`` is above zero."""
    if not 0 < value < float("inf"):
        raise UsageError(
            f"{name} must be positive, not {value!r}.", f"Type for example --set {name}=1."
        )


def not_negative(name: str, value: float) -> None:
    """Raise UsageError unless ``value`` is zero or above."""
    if not 0 <= value < float("inf"):
        raise UsageError(f"{name} must not be negative, not {value!r}.", f"Type --set {name}=0.")


def fraction(name: str, value: float) -> None:
    """Raise UsageError unless ``value`` lies in [0, 1)."""
    if not 0 <= value < 1:
        raise UsageError(f"{name} must lie in [0, 1), not {value!r}.", f"Type --set {name}=0.9.")


def betas(value: tuple[float, ...], count: int = 2) -> None:
    """Raise UsageError unless ``value`` is that many numbers in [0, 1)."""
    if len(value) != count or not all(0 <= beta < 1 for beta in value):
        words = {2: "two", 3: "three"}[count]
        example = ",".join(("0.9", "0.999", "0.9999")[:count])
        raise UsageError(
            f"betas must be {words} numbers in [0, 1), not {value!r}.",
            f"Type --set betas={example}.",
        )


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise UsageError unless ``value`` is one of the known names."""
    if value not in known:
        raise unknown(name, value, known)


def adam(settings: Any) -> None:
    """Check betas, eps and weight_decay of AdamW-like settings. Raises UsageError."""
    betas(settings.betas)
    positive("eps", settings.eps)
    not_negative("weight_decay", settings.weight_decay)


def rank_below(matrix: Matrix, rank: int) -> None:
    """Raise UsageError unless a rank is below the matrix's shorter side."""
    if rank >= matrix.shorter:
        raise UsageError(
            f"Rank {rank} is not below the shorter side of {matrix.name} "
            f"({matrix.rows} × {matrix.columns}).",
            f"Type --rank {max(matrix.shorter // 2, 1)} or less (of an update half on factors: "
            f"--set update.rank=…), or leave the matrix out with --targets.",
        )


def no_dense_start(method: str) -> UsageError:
    """The error of a method that cannot begin from a trained matrix."""
    return UsageError(
        f"{method} cannot start from a dense matrix: it has no dense form.",
        "Train it from scratch, or use another method.",
    )
