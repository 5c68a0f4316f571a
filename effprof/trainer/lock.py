"""One process at a time trains into a folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from effprof.errors import EffprofError
from effprof.files import cannot_write

_NAME = ".running"  # not .lock, by which a bench holds a trial's folder


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """Hold a run's folder; where nothing is in it at the end it is gone.

    The system lets go of it when the process dies, however it does. Raises EffprofError where
    another process holds it, or where it cannot be made.
    """
    path = out / _NAME
    try:
        file = _locked(path)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    except OSError as problem:
        raise cannot_write(out, problem) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
            out.rmdir()
        file.close()


def _locked(path: Path) -> IO[str]:
    """The file, locked. Raises EffprofError where another process has it, OSError."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - it is the lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read() or "another process"
            file.close()
            raise EffprofError(
                f"{str(path.parent)!r} is being trained by {who}.",
                "Wait until it has ended, or give another --out.",
            ) from None
        except OSError:  # a file system without locks
            return file
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        file.close()  # whoever had it has ended meanwhile, and removed it
