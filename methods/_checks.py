"""Checks that several methods share: a setting out of range, a rank the matrix cannot hold."""

from __future__ import annotations

from effprof.errors import UsageError
from effprof.model import Matrix


def positive(name: str, value: float) -> None:
    """Raise UsageError unless ``value`` is above zero."""
    if not 0 < value < float("inf"):
        raise UsageError(
            f"{name} must be positive, not {value!r}.", f"Type for example --set {name}=1."
        )


def betas(value: tuple[float, ...]) -> None:
    """Raise UsageError unless ``value`` is two numbers in [0, 1)."""
    if len(value) != 2 or not all(0 <= beta < 1 for beta in value):
        raise UsageError(
            f"betas must be two numbers in [0, 1), not {value!r}.", "Type --set betas=0.9,0.999."
        )


def not_negative(name: str, value: float) -> None:
    """Raise UsageError unless ``value`` is zero or above."""
    if not 0 <= value < float("inf"):
        raise UsageError(f"{name} must not be negative, not {value!r}.", f"Type --set {name}=0.")


def rank_below(matrix: Matrix, rank: int) -> None:
    """Raise UsageError unless a rank is below the matrix's shorter side."""
    if rank >= matrix.shorter:
        raise UsageError(
            f"Rank {rank} is not below the shorter side of {matrix.name} "
            f"({matrix.rows} × {matrix.columns}).",
            f"Type --rank {max(matrix.shorter // 2, 1)} or less, or leave the matrix out with "
            f"--targets.",
        )
