"""The probe's child process: a plan on standard input, what it measured into a file."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effprof import tape as tapes
from effprof.errors import EffprofError
from effprof.measure import nvml
from effprof.measure.recorder import CpuRecorder, pointers
from effprof.phase import listening
from effprof.plan import Plan, from_dict
from effprof.trainer.build import build, resolve_device
from effprof.trainer.data import Batch, make_batch
from effprof.trainer.layer import MethodLinear
from effprof.trainer.optimizer import MethodOptimizer
from effprof.trainer.step import training_step

STEADY_UPDATES = 2  # recorded, beside a first one and a forced refresh: four in all, three at least
TIMED_UPDATES = (3, 50)


def main() -> None:
    """The child: a plan on standard input, the measurement into the file named by the argument."""
    path, seconds, plan = Path(sys.argv[1]), float(sys.argv[2]), from_dict(json.load(sys.stdin))
    _die_with_parent()
    with contextlib.suppress(OSError):  # short of memory, Linux is to end this process and no other
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    measured: dict[str, Any] = {"reached": "start"}

    def report(**values: Any) -> None:
        measured.update(values)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(measured), encoding="utf-8")
        temporary.replace(path)

    try:
        _measure(plan, seconds, report)
        report(outcome="ok")
    except EffprofError as error:
        report(outcome="error", detail=error.message, hint=error.hint)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the probe's result
        kind = "oom" if _out_of_memory(error) else "failed"
        lines = str(error).splitlines() or [""]
        report(outcome=kind, detail=f"{type(error).__name__}: {lines[0]}")
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


def _measure(plan: Plan, seconds: float, report: Callable[..., None]) -> None:
    device = resolve_device(plan.device, plan.allocator)
    torch.manual_seed(0)
    if device.type == "cuda":
        model, optimizer = _measure_cuda(plan, device, report)
    else:
        model, optimizer = _measure_cpu(plan, device, report)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    times = _timed(model, optimizer, plan, device, seconds)
    report(step_seconds=times, **({} if device.type == "cuda" else {"rss_peak": rss}))


Built = tuple[nn.Module, MethodOptimizer]


def _measure_cpu(plan: Plan, device: torch.device, report: Callable[..., None]) -> Built:
    """The allocator's own record of a first, two steady and the periodic updates."""
    recorder = CpuRecorder()
    recorder.start()
    model, optimizer = build(plan, lr=1e-4)
    recorder.name(pointers(dict(model.named_parameters()), "weights"))
    recorder.name(pointers(dict(model.named_buffers()), "buffers"))
    updates, held = _updates(plan), resident(model, optimizer)
    for number, (kind, due) in enumerate(updates, 1):
        report(reached=f"update {number} ({kind})")
        _say(f"update {number} of {len(updates)} ({kind})")
        if kind == "periodic":
            optimizer.seek(due)

        def on_phase(phase: str, kind: str = kind) -> None:
            if phase == "update":
                recorder.name(pointers(_gradients(model), "gradients"))
            recorder.mark(kind, phase)

        with listening(recorder.inner):
            one_update(model, optimizer, plan, device, on_phase)
        recorder.name(pointers(state_tensors(optimizer), "optimizer"))
        held = most_held(held, resident(model, optimizer))
    recorder.stop()
    tape = recorder.tape()
    peak = tapes.peak(tape)
    report(
        reached="timing",
        memory={
            **peak.by_role,
            "peak_phase": peak.phase,
            "peak_update": peak.update,
            "peak_allocated": peak.size,
        },
        resident=held,
        updates=len(updates),
    )
    return model, optimizer


def _measure_cuda(plan: Plan, device: torch.device, report: Callable[..., None]) -> Built:
    """torch's peak counters over the same updates, and NVML's view of this process beside them."""
    torch.cuda.set_device(device)
    torch.cuda.reset_peak_memory_stats(device)
    model, optimizer = build(plan, lr=1e-4)
    updates, held = _updates(plan), resident(model, optimizer)
    peaks: dict[str, int] = {}
    place = ["build", "build"]

    def on_phase(phase: str) -> None:
        torch.cuda.synchronize(device)
        key = "/".join(place)
        peaks[key] = max(peaks.get(key, 0), torch.cuda.max_memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)
        place[1:] = [phase]

    reserved = 0
    for number, (kind, due) in enumerate(updates, 1):
        report(reached=f"update {number} ({kind})", peaks=peaks)
        _say(f"update {number} of {len(updates)} ({kind})")
        if kind == "periodic":
            optimizer.seek(due)
        on_phase("forward")
        place[0] = kind
        one_update(model, optimizer, plan, device, on_phase)
        on_phase("update")
        reserved = max(reserved, torch.cuda.memory_reserved(device))
        held = most_held(held, resident(model, optimizer))
    where = max(peaks, key=lambda key: peaks[key])
    update, _, phase = where.partition("/")
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    readings = nvml.read(uuid)
    process = readings[0].process if readings else None
    report(
        reached="timing",
        memory={
            "peak_allocated": peaks[where],
            "peak_reserved": reserved,
            "peak_update": update,
            "peak_phase": phase,
            "process_total": process,
            "context": None if process is None else process - torch.cuda.memory_reserved(device),
        },
        resident=held,
        peaks=peaks,
        updates=len(updates),
        gpu={
            "name": torch.cuda.get_device_name(device),
            "uuid": uuid,
            "driver": readings[0].driver if readings else None,
            "reasons": list(readings[0].reasons) if readings else ["NVML cannot be used here"],
        },
    )
    return model, optimizer


def _updates(plan: Plan) -> list[tuple[str, int]]:
    """The updates a probe makes: (kind, number)."""
    first, steady, *periodic = plan.updates
    more = [(steady[0], steady[1] + extra) for extra in range(STEADY_UPDATES)]
    return [first, *more, *periodic]


def one_update(
    model: nn.Module,
    optimizer: MethodOptimizer,
    plan: Plan,
    device: torch.device,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> None:
    batches = [random_batch(plan, device) for _ in range(plan.grad_accum)]
    training_step(model, optimizer, batches, plan, on_phase=on_phase)


def random_batch(plan: Plan, device: torch.device) -> Batch:
    """Rows of random tokens as the plan lays them out: memory and time do not read them."""
    size = (plan.micro_batch, plan.seq_len)
    ids = torch.randint(0, plan.architecture.vocab, size).numpy()
    ids[:, plan.seq_len // 2] = 0  # rows of two documents: isolated ones need a mask then
    lengths = np.full(plan.micro_batch, plan.seq_len) if plan.rows == "padded" else None
    return make_batch(ids, lengths, plan, 0, device)


def _timed(
    model: nn.Module,
    optimizer: MethodOptimizer,
    plan: Plan,
    device: torch.device,
    seconds: float,
) -> dict[str, Any]:
    """Seconds of steady updates: median, spread (half the middle half, over the median), how
    many.
    """
    _say(f"timing steady updates for {seconds:.0f} s")
    least, most = TIMED_UPDATES
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < least or (time.perf_counter() - began < seconds and len(times) < most):
        start = time.perf_counter()
        one_update(model, optimizer, plan, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    quarters = statistics.quantiles(times, n=4)
    median = statistics.median(times)
    return {"median": median, "spread": (quarters[2] - quarters[0]) / 2 / median, "n": len(times)}


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for path, module in model.named_modules():
        if isinstance(module, MethodLinear):
            found |= {f"{path}.{name}": one for name, one in module.gradients.items()}
    return found


def state_tensors(optimizer: MethodOptimizer) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": tensor
        for index, state in enumerate(optimizer.state.values())
        for name, tensor in state.items()
    }


def resident(model: nn.Module, optimizer: MethodOptimizer) -> dict[str, int]:
    """Requested bytes held between updates, by role, from the tensors themselves."""

    def total(tensors: Mapping[str, Tensor]) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    return {
        "weights": total(dict(model.named_parameters())),
        "gradients": total(_gradients(model)),
        "optimizer": total(state_tensors(optimizer)),
        "buffers": total(dict(model.named_buffers())),
    }


def most_held(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    """Of what is held after two updates, that with more optimizer state: blocks may take turns."""
    return max(other, one, key=lambda sizes: sizes["optimizer"])


def _say(text: str) -> None:
    if os.environ.get("EFFPROF_QUIET") != "1":
        sys.stderr.write(f"probe: {text}\n")


if __name__ == "__main__":
    main()
