"""metrics.jsonl: one object per update, each written whole."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effprof.files import cannot_write, write_whole


class Log:
    """Appends one JSON object per line, each by a single unbuffered write.

    Unless it ``writes`` it leaves the file to another process.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self._file: Any = None

    def __enter__(self) -> Log:
        if self.writes:
            self._open()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _open(self) -> None:
        try:
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - until __exit__
        except OSError as problem:
            raise cannot_write(self.path, problem) from None

    def cut(self, last_step: int) -> None:
        """Drop rows after ``last_step``: beyond the checkpoint, they will be written again."""
        if not self.writes or not self.path.exists():
            return
        kept = [row for row in whole_rows(self.path) if json.loads(row)["step"] <= last_step]
        write_whole(self.path, "".join(f"{row}\n" for row in kept))
        if self._file is not None:  # the file of that name is another one now
            self._file.close()
            self._open()

    def append(self, row: dict[str, Any]) -> None:
        """A number that is none, or infinite, becomes null: JSON has neither. Raises EffprofError
        where the disk refuses.
        """
        try:
            self._file.write((plain_json(row) + "\n").encode())
        except OSError as problem:
            raise cannot_write(self.path, problem) from None


def plain_json(row: Mapping[str, Any]) -> str:
    """JSON of numbers of which those that are none, or infinite, are null."""
    lost = {k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    kept = {key: None if key in lost else value for key, value in row.items()}
    return json.dumps(kept, allow_nan=False)


def whole_rows(path: Path) -> list[str]:
    """Lines that are complete JSON: a killed process may have cut the last."""
    found = []
    for row in path.read_text(encoding="utf-8").splitlines():
        try:
            json.loads(row)
        except ValueError:
            break
        found.append(row)
    return found
