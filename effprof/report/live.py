"""The line people watch while a run goes on: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, TypeVar

from effprof.units import GIB, duration, quantity

_PLAIN_LINES = 20
_PLAIN_SECONDS, _LIVE_SECONDS = 10.0, 0.3
_SHORT = 2.0  # seconds that nobody has to be told about
Item = TypeVar("Item")


class LiveLine:
    """Shows a run's metrics on standard error.

    ``steps`` is the whole run, ``start`` where this process began.
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

    def watch(self, what: str, items: Iterable[Item], total: int) -> Iterator[Item]:
        """Pass ``items`` on, showing how far they are: live on a terminal, every ten seconds
        elsewhere.
        """
        began = told = time.monotonic()
        for done, item in enumerate(items):
            now = time.monotonic()
            left = duration((now - began) / max(done, 1) * (total - done))
            text = f"{what} {done}/{total} · ETA {left}"
            if self._live is not None:
                self._live.update(text)
            elif now - told > _PLAIN_SECONDS:
                told = now
                sys.stderr.write(text + "\n")
            yield item

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
        now, peak = metrics["memory"] / GIB, metrics["memory_peak"] / GIB
        parts.append(f"GiB {now:.2f}, peak {peak:.2f}, estimated {self.estimated / GIB:.2f}")
        parts.append(f"ETA {duration(left)}")
        return " · ".join(parts)


def progress(what: str) -> Callable[[int, int], None]:
    """A function told (done, total): it shows how far that is and how long the rest takes, where
    the whole is longer than two seconds; one line on a terminal, every ten seconds elsewhere.
    """
    began = told = time.monotonic()
    shown = False

    def tell(done: int, total: int) -> None:
        nonlocal told, shown
        now, live = time.monotonic(), sys.stderr.isatty()
        if shown and done == total:
            sys.stderr.write("\r\033[K" if live else "")
        whole = (now - began) / max(done, 1) * total
        pause = _LIVE_SECONDS if live else _PLAIN_SECONDS
        if not 0 < done < total or whole < _SHORT or now - told < pause:
            return
        told, shown = now, True
        left = duration(max(round(whole * (1 - done / total)), 1))
        text = f"{what} {done}/{total} · ETA {left}"
        sys.stderr.write(f"\r\033[K{text}" if live else f"{text}\n")
        sys.stderr.flush()

    return tell
