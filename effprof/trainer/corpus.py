"""What ``--data`` names: files, a dataset, or Python's own standard library."""

from __future__ import annotations

import glob
import sysconfig
from pathlib import Path

from effprof.errors import EffprofError, UsageError
from effprof.trainer.documents import SUFFIXES, FileCorpus
from effprof.trainer.streams import DatasetCorpus, ShardCorpus

_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"}


def corpus(data: str | None, *, stream: bool = False) -> FileCorpus | DatasetCorpus:
    """The corpus of ``--data``, files read as a stream where that is asked for.

    Raises UsageError where nothing matches.
    """
    found = _corpus(data)
    if not stream:
        return found
    if not isinstance(found, FileCorpus):
        raise UsageError("--stream has no effect: a dataset is streamed.", "Leave --stream out.")
    return ShardCorpus(found)


def _corpus(data: str | None) -> FileCorpus | DatasetCorpus:
    """The corpus of ``--data``: a file, a folder, a glob, a dataset's name, or by default the
    standard library.

    Raises UsageError where nothing matches.
    """
    if data is None:
        return standard_library()
    path = Path(data).expanduser()
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise UsageError(
                f"--data {data!r} has an unknown format.", f"Known: {', '.join(SUFFIXES)}."
            )
        return FileCorpus([path], data)
    matches = path.rglob("*") if path.is_dir() else map(Path, glob.iglob(data, recursive=True))
    files = sorted(p for p in matches if p.is_file() and p.name.endswith(SUFFIXES))
    if files:
        return FileCorpus(files, data)
    local = data.startswith((".", "/", "~")) or (path.parent.name and path.parent.is_dir())
    if path.exists() or any(c in data for c in "*?[") or local:
        raise UsageError(
            f"--data {data!r} holds no readable file.",
            f"Give {', '.join(SUFFIXES)} files or a folder of them.",
        )
    if data.count("/") != 1 or data.endswith(SUFFIXES):
        raise UsageError(
            f"--data {data!r} does not exist.", "Give a file, a folder, or owner/dataset."
        )
    return DatasetCorpus(data)


def standard_library() -> FileCorpus:
    """The sources of the Python that runs this, one document per file: real text that every
    machine has.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path for path in root.rglob("*.py") if not _SKIPPED & set(path.relative_to(root).parts)
    )
    if not files:
        raise EffprofError(f"No Python sources under {str(root)!r}.", "Give text with --data.")
    return FileCorpus(files, "python-standard-library")
