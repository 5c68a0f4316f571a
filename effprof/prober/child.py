"""The probe's child process: a task on standard input, records of what it measured into a file.

Each record is one line of JSON, written at once: whatever ends this process, what it measured
before stays. Nothing heavy is imported before it is sure to end with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from effprof.errors import EffprofError, said

# What torch, CUDA and its libraries say where memory ran out and no OutOfMemoryError is raised: a
# context on a full card, cuBLAS' and cuSOLVER's own buffers, the driver's pages, the CPU.
_OUT = (
    *("can't allocate memory", "error: out of memory", "CUDA_ERROR_OUT_OF_MEMORY"),
    *("ALLOC_FAILED", "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
)


class Records:
    """Lines of JSON appended to a file, each by writes that are not buffered."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def emit(self, record: str, **values: Any) -> None:
        """Append one record. Raises OSError where the disk refuses."""
        data = (json.dumps({"record": record, **values}) + "\n").encode()
        while data:
            data = data[os.write(self._file, data) :]


def main() -> None:
    """The child: a task on standard input, its records into the file that it names."""
    task = json.load(sys.stdin)
    _die_with(task["parent"])
    with contextlib.suppress(OSError):  # short of memory, Linux is to end this process and no other
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    records = Records(task["records"])
    try:
        from effprof.prober.runner import Runner

        Runner(task, records.emit).run()
        records.emit("end", outcome="ok")
    except EffprofError as error:
        told = {"detail": error.message, "hint": error.hint, "code": error.exit_code}
        records.emit("end", outcome="error", **told)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the probe's result
        outcome = "oom" if out_of_memory(error) else "failed"
        with contextlib.suppress(OSError):  # a full disk: the parent says that it ended early
            records.emit("end", outcome=outcome, detail=said(error))
        os._exit(0 if outcome == "oom" else 1)  # unwinding a profiler out of memory would crash


def _die_with(parent: int) -> None:
    """On Linux: a probe whose parent was killed must not go on alone."""
    with contextlib.suppress(OSError, AttributeError):
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before that
        os._exit(1)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, the host's or the device's."""
    text = str(error)
    named = type(error).__name__ in ("MemoryError", "OutOfMemoryError")
    return named or any(one in text for one in _OUT)


if __name__ == "__main__":
    main()
