"""A short real run in a process of its own, measured: memory by role, process memory, step time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effprof.errors import EffprofError
from effprof.plan import Plan

TIME_LIMIT = 900.0


@dataclass(frozen=True)
class Probe:
    """``outcome`` is ok, oom, killed, timeout or failed.

    ``measured`` holds bytes and seconds as far as it got.
    """

    plan: Plan
    outcome: str
    detail: str
    measured: dict[str, Any]


def probe(plan: Plan, *, seconds: float = 10.0, time_limit: float = TIME_LIMIT) -> Probe:
    """Run a plan's step a few times in a child process; its failure, whatever it is, is a result.

    Steady updates are timed for ``seconds``, three at least.

    Raises EffprofError where the child reports an error of the plan itself.
    """
    with tempfile.TemporaryDirectory(prefix="effprof-probe-") as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "effprof.trainer.probe_child", str(result), str(seconds)]
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={"KINETO_LOG_LEVEL": "99", **os.environ},  # the profiler's own chatter
            text=True,
        )
        try:
            child.communicate(json.dumps(plan.as_dict()), timeout=time_limit)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            return Probe(plan, "timeout", f"no answer in {time_limit:.0f} s", _read(result))
        except BaseException:
            child.kill()
            child.wait()
            raise
        measured = _read(result)
    outcome, detail = measured.pop("outcome", ""), measured.pop("detail", "")
    if child.returncode < 0 and not outcome:
        name = signal.Signals(-child.returncode).name
        hint = " (the system ran out of memory?)" if child.returncode == -signal.SIGKILL else ""
        return Probe(plan, "killed", f"the probe's process was killed by {name}{hint}", measured)
    if outcome == "error":
        raise EffprofError(detail, measured.get("hint", ""))
    return Probe(plan, outcome or "failed", detail or f"exit code {child.returncode}", measured)


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found
