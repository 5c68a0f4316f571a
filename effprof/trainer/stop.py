"""Why a run ends before its last step: a signal, or the time it was given."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from effprof.errors import StoppedError
from effprof.signals import SIGNALS
from effprof.trainer.world import World

_LOOK = 0.2  # seconds of waiting for data from one look at the signals to the next
_PRESS = 1.0  # seconds in which signals are one: a terminal's, and torchrun's that passes it on
_ENOUGH = 3  # signals, of which the last ends the process at once


class Stop:
    """Remembers SIGINT, SIGTERM and SIGUSR1 until the step is finished and saved, and watches the
    clock. A second signal changes nothing; a third does what it always did.

    ``limit`` is seconds from now, None for no limit. ``code`` is the exit code: 130 or 143 after a
    signal, 0 where the time is up.
    """

    press = 0.0

    def __init__(self, limit: float | None = None) -> None:
        self.code = 0
        self._ends = None if limit is None else time.monotonic() + limit
        self._before: dict[int, Any] = {}
        self._noted = self._heard = 0
        self._last = -_PRESS

    def __enter__(self) -> Stop:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self._heard += now - self._last >= self.press
        self._last = now
        self._noted = SIGNALS[signal.Signals(number)]
        if self._heard >= _ENOUGH:
            self.__exit__()
            os.kill(os.getpid(), number)

    def check(self) -> None:
        """Raise StoppedError for a signal that came before the first update."""
        if self._noted:
            raise StoppedError(self._noted)

    def go_on(self, ready: Callable[[float], bool], needed: float = 0.0) -> bool:
        """Wait until ``ready``, which is given seconds to wait itself; False where the run is to
        stop first.
        """
        while True:
            lacking = not ready(_LOOK)
            stop, lacking = self._agreed(needed, lacking=lacking)
            if stop or not lacking:
                return not stop

    def wanted(self, needed: float = 0.0) -> bool:
        """Whether to stop now, where what is still to do takes ``needed`` seconds."""
        return self._agreed(needed, lacking=False)[0]

    def _agreed(self, needed: float, *, lacking: bool) -> tuple[bool, bool]:
        """Whether to stop, and whether somebody lacks data."""
        self.code = self._noted
        return bool(self.code) or self.late(needed), lacking

    def late(self, needed: float = 0.0) -> bool:
        """Whether less than ``needed`` seconds are left."""
        return self._ends is not None and time.monotonic() + needed >= self._ends


class SharedStop(Stop):
    """A ``Stop`` that every process of a run takes at the same step, whichever had the signal.

    ``code`` is what all have agreed on when they last asked, which all of them do together.
    """

    press = _PRESS

    def __init__(self, limit: float | None, world: World) -> None:
        super().__init__(limit)
        self._world = world

    def _agreed(self, needed: float, *, lacking: bool) -> tuple[bool, bool]:
        code, late, lacks = self._world.most(self._noted, self.late(needed), lacking)
        self.code = int(code)
        return bool(code or late), bool(lacks)
