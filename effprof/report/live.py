"""The line people watch while a run goes on: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from effprof.units import duration, gib, quantity

_PLAIN_LINES = 20


class LiveLine:
    """Shows a run's metrics on standard error. ``steps`` is the whole run, ``start`` where this
    process began.
    """

    def __init__(self, steps: int, start: int, estimated: int) -> None:
        self.steps, self.start, self.estimated = steps, start, estimated
        self._began = time.monotonic()
        self._live: Any = None

    def __enter__(self) -> LiveLine:
        if sys.stderr.isatty():
            from rich.live import Live

            from effprof.report.terminal import console

            self._live = Live(console=console(stderr=True), refresh_per_second=4, transient=False)
            self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)

    def show(self, metrics: Mapping[str, Any]) -> None:
        """One update's metrics; without a terminal only about twenty of a run's are printed."""
        step = int(metrics["step"])
        if self._live is not None:
            self._live.update(self._text(metrics))
        elif step in (self.start + 1, self.steps) or step % max(self.steps // _PLAIN_LINES, 1) == 0:
            sys.stderr.write(self._text(metrics) + "\n")

    def note(self, text: str) -> None:
        """A line that stays: a validation result, a checkpoint, a warning."""
        if self._live is not None:
            self._live.console.print(text)
        else:
            sys.stderr.write(text + "\n")

    def _text(self, metrics: Mapping[str, Any]) -> str:
        step = int(metrics["step"])
        elapsed = time.monotonic() - self._began
        left = elapsed / max(step - self.start, 1) * (self.steps - step)
        parts = [
            f"step {step}/{self.steps}",
            f"loss {metrics['loss']:.4f}",
            f"lr {metrics['lr']:.2e}",
            f"{quantity(metrics['tokens_per_second'])} tok/s",
        ]
        if metrics.get("mfu") is not None:
            parts.append(f"MFU {100 * metrics['mfu']:.1f} %")
        parts.append(
            f"memory {gib(metrics['memory'])} (peak {gib(metrics['memory_peak'])}, estimated "
            f"{gib(self.estimated)})"
        )
        parts.append(f"ETA {duration(left)}")
        return " · ".join(parts)
