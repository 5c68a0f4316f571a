"""Where metrics go beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from effprof.errors import UsageError, unknown

if TYPE_CHECKING:
    from effprof.trainer.run import Run


class Sink(Protocol):
    """Takes a row of numbers per update."""

    def log(self, numbers: Mapping[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    """Event files in the run's own folder."""

    def __init__(self, run: Run, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(run.out / "tensorboard", purge_step=start + 1)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Tracker:
    """wandb and trackio have the same functions; a name of the folder's own resumes a run."""

    def __init__(self, module: str, run: Run, **more: Any) -> None:
        self._module = importlib.import_module(module)
        config = {"plan": run.plan.as_dict(), "train": run.table()}
        name = run.out.absolute().name
        self._module.init(project="effprof", name=name, config=config, resume="allow", **more)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._module.log(dict(numbers), step=step)

    def close(self) -> None:
        self._module.finish()


def _wandb(run: Run, start: int) -> Sink:
    """Offline unless WANDB_MODE says otherwise; `wandb sync` sends it later."""
    mode = os.environ.get("WANDB_MODE", "offline")
    return _Tracker("wandb", run, dir=str(run.out), id=run.out.absolute().name, mode=mode)


_SINKS: dict[str, tuple[str, Callable[[Run, int], Sink]]] = {
    "tensorboard": ("tensorboard", _TensorBoard),
    "wandb": ("wandb", _wandb),
    "trackio": ("trackio", lambda run, start: _Tracker("trackio", run)),
}


def check(names: str) -> None:
    """Raise UsageError for a name that is none, or is not installed."""
    for name in filter(None, names.split(",")):
        if name not in _SINKS:
            raise unknown("--log", name, _SINKS)
        if importlib.util.find_spec(_SINKS[name][0]) is None:
            raise UsageError(f"--log {name} needs {name}.", f"Type pip install {_SINKS[name][0]}.")


class Sinks:
    """Those a run asked for. One that fails is left out from then on: the run goes on."""

    def __init__(self, run: Run, start: int, say: Callable[[str], None]) -> None:
        self._say = say
        self._open: dict[str, Sink] = {}
        for name in filter(None, run.log.split(",")):
            self._guarded(name, partial(self._begin, name, run, start))

    def _begin(self, name: str, run: Run, start: int) -> None:
        self._open[name] = _SINKS[name][1](run, start)

    def log(self, row: Mapping[str, Any]) -> None:
        numbers = {key: float(v) for key, v in row.items() if isinstance(v, int | float)}
        step = int(numbers.pop("step"))
        for name, sink in list(self._open.items()):
            self._guarded(name, partial(sink.log, numbers, step))

    def close(self) -> None:
        for name, sink in list(self._open.items()):
            self._guarded(name, sink.close)

    def _guarded(self, name: str, act: Callable[[], None]) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                act()
        except Exception as problem:  # noqa: BLE001 - theirs to raise; metrics.jsonl has the row
            self._open.pop(name, None)
            self._say(f"--log {name} stopped: {type(problem).__name__}: {problem}")
