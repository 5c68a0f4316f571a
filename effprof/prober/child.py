"""The probe's child process: a task on standard input, records of what it measured into a file.

Each record is one line of JSON, written at once: whatever ends this process, what it measured
before stays.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effprof.errors import EffprofError
from effprof.measure.recorder import Recorder, pointers
from effprof.measure.sampler import INTERVAL
from effprof.measure.window import Window
from effprof.phase import listening
from effprof.plan import Plan, from_dict
from effprof.prober.place import Place, place
from effprof.prober.records import SCHEMA, enough
from effprof.trainer.build import build, resolve_device
from effprof.trainer.optimizer import MethodOptimizer
from effprof.trainer.synthetic import gradients, one_update, resident, state_tensors

STEADY_UPDATES = 2  # beside a first one and each periodic one
Emit = Callable[..., None]


def main() -> None:
    """The child: a task on standard input, its records into the file that it names."""
    task = json.load(sys.stdin)
    _die_with_parent()
    with contextlib.suppress(OSError):  # short of memory, Linux is to end this process and no other
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    file = open(task["records"], "ab", buffering=0)  # noqa: SIM115 - open until the process ends

    def emit(record: str, **values: Any) -> None:
        file.write((json.dumps({"record": record, **values}) + "\n").encode())

    try:
        plan = from_dict(task["plan"])
        _Probe(plan, task, emit).run()
        emit("end", outcome="ok")
    except EffprofError as error:
        emit("end", outcome="error", detail=error.message, hint=error.hint, code=error.exit_code)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the probe's result
        lines = str(error).splitlines() or [""]
        outcome = "oom" if _out_of_memory(error) else "failed"
        emit("end", outcome=outcome, detail=f"{type(error).__name__}: {lines[0]}")
        os._exit(0)  # unwinding a profiler that ran out of memory would only crash


def _die_with_parent() -> None:
    """On Linux: a probe whose parent was killed must not go on alone."""
    with contextlib.suppress(OSError, AttributeError):
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def _out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text
    )


class _Probe:
    """One plan's updates, recorded; then timed."""

    def __init__(self, plan: Plan, task: dict[str, Any], emit: Emit) -> None:
        self.plan, self.task, self.emit = plan, task, emit
        self.device = resolve_device(plan.device, plan.allocator)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def run(self) -> None:
        torch.manual_seed(0)
        with place(self.plan.device, self.device) as where:
            self.emit(
                "start",
                schema=SCHEMA,
                taken=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                plan=self.plan.as_dict(),
                versions=_versions(),
                device=where.describe(),
            )
            try:
                with Window(self.device, where.source, interval=self._interval) as window:
                    model, optimizer = self._updates(where)
                self.emit("window", name="updates", **window.measurement.as_dict())
                self._counters(where)
                self._time(where, model, optimizer)
            except Exception as error:
                if _out_of_memory(error):
                    self._last_instant(where)
                self._lost(where)
                raise

    @property
    def _interval(self) -> float:
        return float(self.task.get("interval", INTERVAL))

    def _updates(self, where: Place) -> tuple[nn.Module, MethodOptimizer]:
        """Build, a first, two steady and each periodic update: also the warm-up of what follows."""
        self.recorder: Recorder | None = None
        if self.task.get("recorded", True):
            self.recorder = where.recorder(labelled=bool(self.task.get("labelled")))
            self.recorder.start()
        self.emit("reached", update="build", phase="build")
        where.restart_peak()
        model, optimizer = build(self.plan, str(self.device), lr=1e-4)
        self._name(pointers(dict(model.named_parameters()), "weights"))
        self._name(pointers(dict(model.named_buffers()), "buffers"))
        updates = planned(self.plan)
        with listening(self.recorder.inner) if self.recorder else contextlib.nullcontext():
            for number, (kind, due) in enumerate(updates, 1):
                _say(f"update {number} of {len(updates)} ({kind})")
                self._update(where, model, optimizer, (number, kind, due))
        if self.recorder:
            self.recorder.stop()
            tape, self.recorder = self.recorder.tape(), None
            self.emit(
                "tape",
                events=tape.events,
                roles=tape.roles,
                labels=tape.labels,
                marks=tape.marks,
            )
        return model, optimizer

    def _update(
        self, where: Place, model: nn.Module, optimizer: MethodOptimizer, one: tuple[int, str, int]
    ) -> None:
        number, kind, due = one
        peaks: dict[str, int] = {}
        current = ["before"]
        if kind == "periodic":
            optimizer.seek(due)

        def on_phase(phase: str) -> None:
            where.synchronise()
            self._note_peak(where, peaks, current[0])
            current[0] = phase
            self.emit("reached", update=f"{number} ({kind})", phase=phase)
            if self.recorder:
                if phase == "update":
                    self.recorder.name(pointers(gradients(model), "gradients"))
                self.recorder.mark(kind, phase)

        self._note_peak(where, {}, "")
        began = time.perf_counter()
        one_update(model, optimizer, self.plan, self.device, on_phase)
        where.synchronise()
        seconds = time.perf_counter() - began
        self._note_peak(where, peaks, current[0])
        self._name(pointers(state_tensors(optimizer), "optimizer"))
        self.emit(
            "update",
            number=number,
            kind=kind,
            seconds=seconds,
            peaks=peaks,
            resident=resident(model, optimizer),
            reserved=where.reserved(),
        )

    def _note_peak(self, where: Place, peaks: dict[str, int], phase: str) -> None:
        peak = where.allocated_peak()
        if peak is not None:
            peaks[phase] = max(peaks.get(phase, 0), peak)
            where.restart_peak()

    def _name(self, names: dict[int, tuple[str, str]]) -> None:
        if self.recorder:
            self.recorder.name(names)

    def _counters(self, where: Place) -> None:
        """What lies outside the caching allocator, and what a cuBLAS handle takes inside it."""
        process, meter = where.process()
        reserved = where.reserved()
        self.emit(
            "counters",
            reserved=reserved,
            process=process,
            meter=meter,
            workspace=where.workspace(),
        )

    def _time(self, where: Place, model: nn.Module, optimizer: MethodOptimizer) -> None:
        """Steady updates until their spread is small enough, or the time or their number is up."""
        seconds, steps = float(self.task["seconds"]), self.task.get("steps")
        _say(f"timing {steps or f'up to {seconds:.0f} s of'} steady updates")
        times: list[float] = []
        optimizer.seek(1)
        began = time.perf_counter()
        with Window(self.device, where.source, where.pid(), self._interval) as window:
            while not enough(times, time.perf_counter() - began, seconds, steps):
                start = time.perf_counter()
                one_update(model, optimizer, self.plan, self.device)
                where.synchronise()
                times.append(time.perf_counter() - start)
                self.emit("step", seconds=times[-1])
        self.emit("window", name="steady", **window.measurement.as_dict())
        for due in dict.fromkeys(
            number for kind, number in self.plan.updates if kind == "periodic"
        ):
            optimizer.seek(due)
            start = time.perf_counter()
            one_update(model, optimizer, self.plan, self.device)
            where.synchronise()
            self.emit("periodic", number=due, seconds=time.perf_counter() - start)

    def _last_instant(self, where: Place) -> None:
        """Out of memory: what the device and its allocator held when it happened."""
        process, meter = where.process()
        self.emit("oom", process=process, meter=meter, reserved=where.reserved())
        if self.recorder is not None and self.plan.device == "cuda":
            self.recorder.stop()  # the host has memory left; a CPU's own recorder has none
            tape = self.recorder.tape()
            self.emit(
                "tape", events=tape.events, roles=tape.roles, labels=tape.labels, marks=tape.marks
            )

    def _lost(self, where: Place) -> None:
        reasons = where.source.read().reasons
        if any("lost" in why for why in reasons.values()):
            self.emit("lost", reasons=reasons)


def planned(plan: Plan) -> list[tuple[str, int]]:
    """The updates a probe makes: (kind, number)."""
    first, steady, *periodic = plan.updates
    more = [(steady[0], steady[1] + extra) for extra in range(STEADY_UPDATES)]
    return [first, *more, *periodic]


def _versions() -> dict[str, str]:
    names = ("effprof", "torch", "transformers")
    return {name: version(name) for name in names} | {
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _say(text: str) -> None:
    if os.environ.get("EFFPROF_QUIET") != "1":
        sys.stderr.write(f"probe: {text}\n")


if __name__ == "__main__":
    main()
