"""The errors a user can cause: one sentence with the bad value, one hint with what to type."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EffprofError(ValueError):
    """Something the user can put right.

    ``message`` says what happened with which value, ``hint`` what to type instead.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(EffprofError):
    """A bad name, value or combination of settings."""

    exit_code = 2


class DoesNotFitError(EffprofError):
    """The plan needs more memory than the device has, or a measurement is out of tolerance."""

    exit_code = 3


class NoDeviceError(EffprofError):
    """A GPU is needed and there is none."""

    exit_code = 4


class StoppedError(EffprofError):
    """A run was stopped before its first update."""

    def __init__(self, code: int) -> None:
        super().__init__(
            "Stopped while its text was prepared: no update was made.",
            "The same command prepares it again.",
        )
        self.exit_code = code


def said(problem: BaseException) -> str:
    """The kind of an exception, and the first line of what it says."""
    lines = str(problem).splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0]}"


def unknown(kind: str, value: str, known: Iterable[str], see: str = "") -> UsageError:
    """The error for a name that does not exist, with the nearest names that do."""
    names = sorted(known)
    near = difflib.get_close_matches(value.lower(), names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(names)}."
    return UsageError(f"Unknown {kind} {value!r}.", f"{hint} {see}".strip())
