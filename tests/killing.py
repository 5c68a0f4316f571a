"""Runs that are killed: children forked from one process that has torch, so that each is cheap.

usage: python killing.py FOLDER CASES

CASES is JSON, {name: [kills, argument, ...]}. Each command line is trained whole, then killed that
many times at random instants, or, where kills is 0, before every step of writing a checkpoint, and
resumed until it ends. Prints what happened as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from effprof.cli import run
from effprof.trainer import checkpoint, loop  # noqa: F401 - imported once, before the forks

torch.set_num_threads(1)


def child(arguments: list[str], log: Path, prepare: Callable[[], None]) -> int:
    """Fork a training run; the process id."""
    pid = os.fork()
    if pid:
        return pid
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    prepare()
    os._exit(run(arguments))


def ended(pid: int, seconds: float) -> bool:
    """Whether a child ended by itself within that time; its exit code must be 0."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            if os.WIFSIGNALED(status):
                assert os.WTERMSIG(status) == signal.SIGKILL
                return False
            assert os.waitstatus_to_exitcode(status) == 0, "see the log"
            return True
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def dies_at(call: int) -> Callable[[], None]:
    """Make the process kill itself before that call of what writing a checkpoint does."""
    seen = 0

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **more: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **more)

        return wrapped

    def prepare() -> None:
        for name in ("save_file", "digest", "flush", "_surplus"):
            setattr(checkpoint, name, counting(getattr(checkpoint, name)))
        Path.rename = counting(Path.rename)  # type: ignore[method-assign]
        os.replace = counting(os.replace)

    return prepare


def reached(out: Path) -> int:
    """The step of the newest good checkpoint; -1 for none."""
    found = checkpoint.newest(out) if out.exists() else None
    return -1 if found is None else int(found[1]["step"])


def losses(out: Path) -> list[float]:
    rows = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in rows]


def suffer(folder: Path, kills: int, arguments: list[str], chance: random.Random) -> dict[str, Any]:
    """One case: a whole run beside one that is killed again and again."""
    folder.mkdir()
    log, cut = folder / "log", folder / "cut"
    began = time.monotonic()
    assert ended(child([*arguments, "--out", str(folder / "whole")], log, lambda: None), 120)
    whole = time.monotonic() - began
    survived, best, call = 0, -1, 0
    again = [*arguments, "--out", str(cut), "--resume"]
    while True:
        call += 1
        if kills:
            seconds = chance.uniform(0, whole / kills) if survived < kills else 120.0
            pid = child(again, log, lambda: None)
        else:
            pid, seconds = child(again, log, dies_at(call)), 120.0
        if ended(pid, seconds):
            break
        survived += 1
        now = reached(cut)
        assert now >= best, f"step {best} was saved, {now} is left"
        best = now
    same = losses(cut) == losses(folder / "whole")
    return {"kills": survived, "same": same, "losses": len(losses(cut))}


def main() -> None:
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    arguments = next(iter(cases.values()))[1:]
    with contextlib.redirect_stdout(sys.stderr):  # here, so that every module is imported
        assert run([*arguments, "--out", str(folder / "first")]) == 0
    chance = random.Random(7)
    found = {name: suffer(folder / name, *_split(case), chance) for name, case in cases.items()}
    print(json.dumps(found))


def _split(case: list[Any]) -> tuple[int, list[str]]:
    return case[0], case[1:]


if __name__ == "__main__":
    main()
