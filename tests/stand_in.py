"""The probe's child where there is no GPU: torch.cuda answers from the CPU's own record.

The model runs on the CPU, the allocator's history is the CPU's in CUDA's form, and NVML is the real
binding over the library that tests/fake_nvml.c makes. Run in place of ``effprof.prober.child``.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from effprof.measure.recorder import CpuRecorder
from effprof.prober import child, runner

GIB = 2**30


class History:
    """CUDA's memory history, made of what torch.profiler records of the CPU allocator."""

    def __init__(self) -> None:
        self._profile: Any = None

    def record(self, enabled: str | None = "all", **options: Any) -> None:
        if enabled:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.start()

    def snapshot(self, device: Any = None) -> dict[str, Any]:
        self._profile.stop()
        reader = CpuRecorder()
        reader._profile = self._profile
        stamps = self._times()
        trace = []
        for (pointer, size, operation), stamp in zip(
            filter(None, reader._events()), stamps, strict=True
        ):
            action = "alloc" if size > 0 else "free_completed"
            frames = [{"filename": "model.py", "name": operation, "line": 1}]
            trace.append(
                {
                    "action": action,
                    "addr": pointer,
                    "size": abs(size),
                    "time_us": stamp / 1000,
                    "frames": frames,
                }
            )
        return {"device_traces": [trace]}

    def _times(self) -> list[int]:
        from torch._C._profiler import _EventType

        tree = list(self._profile.profiler.kineto_results.experimental_event_tree())
        found = []
        while tree:
            node = tree.pop()
            if node.tag == _EventType.Allocation:
                found.append(node.start_time_ns)
            tree.extend(node.children)
        return sorted(found)


def install() -> None:
    """Replace what a probe asks of torch.cuda."""
    history, reserved = History(), int(os.environ.get("STAND_IN_RESERVED", GIB))
    workspace = iter([0, 8_519_680] * 10)
    total = int(os.environ.get("NVML_TOTAL", str(80 * GIB)).split(",")[0])
    os.environ.setdefault("NVML_PID", f"0,{os.getpid()}")  # not there before it began
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "reset_peak_memory_stats": lambda device=None: None,
        "max_memory_allocated": lambda device=None: int(os.environ["STAND_IN_ALLOCATED"]),
        "max_memory_reserved": lambda device=None: reserved,
        "memory_reserved": lambda device=None: reserved,
        "memory_stats": lambda device=None: {"requested_bytes.all.current": next(workspace)},
        "mem_get_info": lambda device=None: (total - 3 * GIB, total),
        "get_device_name": lambda device=None: os.environ.get("NVML_NAME", "NVIDIA A100-SXM4-80GB"),
        "get_device_capability": lambda device=None: (8, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(
            uuid=os.environ.get("STAND_IN_UUID", "aaaa")
        ),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.memory._record_memory_history = history.record
    torch.cuda.memory._snapshot = history.snapshot
    torch._C._cuda_clearCublasWorkspaces = lambda: None
    runner.resolve_device = lambda name, allocator="default": torch.device("cpu")
    fail = os.environ.get("STAND_IN_FAIL", "")
    if fail:
        _failing(fail)


def _failing(how: str) -> None:
    """``oom@3`` or ``lost@3``: the third update ends so."""
    kind, _, number = how.partition("@")
    original, calls = runner.one_update, [0]

    def one_update(*arguments: Any, **options: Any) -> None:
        calls[0] += 1
        original(*arguments, **options)
        if calls[0] == int(number) and kind == "oom":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if calls[0] == int(number):
            raise RuntimeError("CUDA error: unspecified launch failure")

    runner.one_update = one_update


if __name__ == "__main__":
    install()
    child.main()
