"""Which part of an update runs: the optimizer and the methods say it, a recorder listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_listeners: list[Callable[[str], None]] = []


@contextmanager
def phase(name: str) -> Iterator[None]:
    """What runs inside belongs to this phase (refresh, restart) of an update.

    Costs nothing where nobody listens; backward's own thread says it too.
    """
    for listener in _listeners:
        listener(name)
    try:
        yield
    finally:
        for listener in _listeners:
            listener("")


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """``listener`` is told each phase that begins, and ``""`` where it ends."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
