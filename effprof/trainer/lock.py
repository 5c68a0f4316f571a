"""One process at a time trains into a folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

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
        out.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - until the end
    except OSError as problem:
        raise cannot_write(out, problem) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise EffprofError(
                f"{str(out)!r} is being trained by {file.read() or 'another process'}.",
                "Wait until it has ended, or give another --out.",
            ) from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            if [one.name for one in out.iterdir()] == [_NAME]:
                with contextlib.suppress(OSError):
                    path.unlink()
                    out.rmdir()
