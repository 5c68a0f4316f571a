"""Why a run ends before its last step: a signal, or the time it was given."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

from effprof.trainer.world import World

_SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}


class Stop:
    """Remembers SIGINT, SIGTERM and SIGUSR1 until the step is finished, and watches the clock.

    ``limit`` is seconds from now, None for no limit. ``code`` is the exit code: 130 or 143 after a
    signal, 0 where the time is up.
    """

    def __init__(self, limit: float | None = None) -> None:
        self.code = 0
        self._ends = None if limit is None else time.monotonic() + limit
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.code = _SIGNALS[signal.Signals(number)]
        self.__exit__()  # a second signal does what it always did

    def wanted(self, needed: float = 0.0) -> bool:
        """Whether to stop now, where what is still to do takes ``needed`` seconds."""
        return bool(self.code) or self.late(needed)

    def late(self, needed: float = 0.0) -> bool:
        """Whether less than ``needed`` seconds are left."""
        return self._ends is not None and time.monotonic() + needed >= self._ends


class SharedStop(Stop):
    """A ``Stop`` that every process of a run takes at the same step, whichever had the signal.

    ``code`` is what all have agreed on when they last asked.
    """

    def __init__(self, limit: float | None, world: World) -> None:
        super().__init__(limit)
        self._world, self._noted = world, 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = _SIGNALS[signal.Signals(number)]
        self.__exit__()

    def wanted(self, needed: float = 0.0) -> bool:
        """Whether any process is to stop now. Called by all of them."""
        code, late = self._world.most(self._noted, self.late(needed))
        self.code = int(code)
        return bool(code or late)
