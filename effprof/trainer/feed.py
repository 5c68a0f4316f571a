"""Micro-batches made ready beside the training, and where in the data the used ones end."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from effprof.trainer.batch import Batch
from effprof.trainer.world import World

_AHEAD = 4  # updates
_STALLED = 1.0  # seconds after which a source that was asked for rows is left behind


class Source(Protocol):
    """What micro-batches come from, in host memory; its state is JSON."""

    def next(self) -> Batch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


@dataclass(slots=True)
class Drawn:
    """This process's micro-batches of one update, the state after them, the seconds waited for
    them; targets and real tokens of all processes' micro-batches.
    """

    batches: list[Batch]
    state: dict[str, Any]
    waited: float
    targets: int
    real_tokens: int


class Feed:
    """Draws each update's ``count`` micro-batches in a thread, a few updates ahead.

    Every process draws those of all and keeps each ``world.size``-th: however many processes there
    are, together they use the same rows in the same order.

    Its state is that of what was used, not of what was drawn ahead.
    """

    def __init__(
        self, source: Source, count: int, device: torch.device, world: World | None = None
    ) -> None:
        self.source, self.count, self.device = source, count, device
        self.world = world or World()
        self.used = source.state_dict()
        self._thread: threading.Thread | None = None
        self._found: Any = None
        self._waited = 0.0

    def ready(self, seconds: float | None) -> bool:
        """Whether the next update's micro-batches are there within that time, None for however long
        it takes. Raises what reading the data raised.
        """
        if self._thread is None:
            self._start()
        began = time.perf_counter()
        with contextlib.suppress(queue.Empty):
            self._found = self._found or self._ready.get(timeout=seconds)
        self._waited += time.perf_counter() - began
        if isinstance(self._found, BaseException):
            self.close()
            raise self._found
        return self._found is not None

    def next(self) -> Drawn:
        """The next update's micro-batches on the device. Raises what reading the data raised."""
        self.ready(None)
        (drawn, self.used), self._found = self._found, None
        waited, self._waited = self._waited, 0.0
        mine = drawn[self.world.rank :: self.world.size]
        targets, real = sum(b.targets for b in drawn), sum(b.real_tokens for b in drawn)
        return Drawn([b.to(self.device) for b in mine], self.used, waited, targets, real)

    def state_dict(self) -> dict[str, Any]:
        return self.used

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.close(wait=True)
        self.source.load_state_dict(state)
        self._found = None
        self.used = state

    def close(self, *, wait: bool = False) -> None:
        """End the thread; one whose source stalls is left behind unless it is to ``wait``.

        What it drew ahead is lost, and drawn again after a restored state.
        """
        if self._thread is not None:
            self._ended.set()
            self._thread.join(None if wait else _STALLED)
            self._thread = None

    def _start(self) -> None:
        self._ready: queue.Queue[Any] = queue.Queue(_AHEAD)
        self._ended = threading.Event()
        arguments = (self._ready, self._ended)
        self._thread = threading.Thread(target=self._draw, args=arguments, daemon=True, name="data")
        self._thread.start()

    def _draw(self, ready: queue.Queue[Any], ended: threading.Event) -> None:
        found: Any = None
        while not ended.is_set():
            try:
                if found is None:
                    count = self.count * self.world.size
                    batches = [self.source.next() for _ in range(count)]
                    if self.device.type == "cuda":
                        batches = [batch.pinned() for batch in batches]
                    found = batches, self.source.state_dict()
            except BaseException as problem:  # noqa: BLE001 - raised again where it is used
                found = problem
            try:
                ready.put(found, timeout=0.05)
            except queue.Full:
                continue
            if isinstance(found, BaseException):
                return
            found = None
