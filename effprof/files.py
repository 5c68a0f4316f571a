"""Where effprof keeps things, and writing files whole or not at all.

Every estimate imports it: what only writing needs is imported there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from effprof.errors import EffprofError


def home() -> Path:
    """effprof's own folder: measurements, tokenizers, tokenised text. EFFPROF_HOME moves it."""
    return Path(os.environ.get("EFFPROF_HOME") or Path.home() / ".cache" / "effprof")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write under a temporary name, flush to disk, rename: readers see the old file or the new one.

    Raises EffprofError when the disk is full or the folder cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}")
        try:
            with open(temporary, "xb") as file:  # readable by whom the umask says
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as problem:
        raise cannot_write(path, problem) from None


def check_writable(path: Path) -> None:
    """Raises EffprofError for a file that could not be written, before the work is done."""
    existing = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    if path.is_dir() or not os.access(existing, os.W_OK):
        raise cannot_write(path, IsADirectoryError(21, "it is a folder, or not yours to write"))
    if existing.is_file() and existing != path.absolute():
        raise cannot_write(path, NotADirectoryError(20, "Not a directory"))


def write_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` write a folder under a temporary name, then put it in the old one's place.

    Raises EffprofError when the disk is full or the place cannot be written.
    """
    import shutil

    from safetensors import SafetensorError

    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        fill(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except (OSError, SafetensorError) as problem:
        shutil.rmtree(temporary, ignore_errors=True)
        raise cannot_write(folder, problem) from None


def cannot_write(path: Path, problem: Exception) -> EffprofError:
    """The error for a write the system, or safetensors for it, refused."""
    reason = getattr(problem, "strerror", None) or problem
    elsewhere = isinstance(problem, FileExistsError | NotADirectoryError | PermissionError)
    return EffprofError(
        f"Cannot write {str(path)!r}: {reason}.",
        f"{'Use' if elsewhere else 'Free some space or use'} another folder (--out, EFFPROF_HOME); "
        f"nothing half-written stays.",
    )


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    import hashlib

    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Plain tables of strings, numbers, booleans, lists and one level of sub-tables as TOML.

    None is left out.
    """
    import json

    lines: list[str] = []
    for name, table in tables.items():
        nested = {key: value for key, value in table.items() if isinstance(value, Mapping)}
        lines.append(f"[{name}]")
        for key, value in table.items():
            if value is not None and key not in nested:
                # JSON's strings, numbers, booleans and lists are TOML's.
                text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
                lines.append(f"{key} = {text}")
        lines.append("")
        for key, value in nested.items():
            lines += [to_toml({f"{name}.{key}": value})]
    return "\n".join(lines)
