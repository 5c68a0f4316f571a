"""Documents of files, split once by the hash of their content."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from effprof.errors import EffprofError

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".parquet")
VALIDATION_SHARE = 50  # one document in fifty
_DIGESTED = 2 * 2**30  # bytes
_BLOCK = 2**20  # bytes
PIECE = 2**16  # characters: a long text file is several documents


class FileCorpus:
    """Documents of a fixed list of files, in a fixed order; a document's hash decides its split."""

    def __init__(self, files: list[Path], name: str) -> None:
        self.files = files
        self.name = name

    def fingerprint(self) -> str:
        """Changes when a file is added, removed or written."""
        rows = [(str(f), s.st_size, s.st_mtime_ns) for f in self.files for s in [f.stat()]]
        return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]

    def digest(self) -> str:
        """What the files hold, wherever they lie and whenever they were copied there: beyond 2 GiB
        their names and sizes. Runs and studies keep it, so its rule cannot change.

        Raises EffprofError for a file that cannot be read.
        """
        found, path = hashlib.sha256(), Path()
        try:
            sizes = [path.stat().st_size for path in self.files]
            for path, size in zip(self.files, sizes, strict=True):
                found.update(f"{path.name}\0{size}\0".encode())
                if sum(sizes) <= _DIGESTED:
                    with open(path, "rb") as file:
                        while block := file.read(_BLOCK):
                            found.update(block)
        except OSError as problem:
            raise EffprofError(
                f"Cannot read {str(path)!r}: {problem.strerror}.", "See --data."
            ) from None
        return found.hexdigest()[:16]

    def check(self) -> dict[str, Any]:
        """Read the first document of every file; how many files and bytes there are.

        Raises EffprofError for one that cannot be read.
        """
        for path in self.files:
            next(self._guarded(path), None)
        return {"files": len(self.files), "bytes": sum(f.stat().st_size for f in self.files)}

    def documents(self, split: str) -> Iterator[str]:
        """The documents of ``train`` or ``validation``.

        Raises EffprofError for a file that cannot be read.
        """
        least = self._least
        for text in self._all():
            key = key_of(text)
            if (key == least or held_out(key)) == (split == "validation"):
                yield text

    @functools.cached_property
    def _least(self) -> int | None:
        """The least key, where no document's key holds it out; else None.

        Reads until there is a document for each split. Raises EffprofError where there are not two
        to tell apart.
        """
        least, other = None, False
        for text in self._all():
            key = key_of(text)
            if held_out(key) and (least is not None or other):
                return None
            other = other or held_out(key) or (least is not None and key != least)
            least = least if held_out(key) else min(key, least if least is not None else key)
        if not other:
            count = 0 if least is None else 1
            raise EffprofError(
                f"{self.name!r} holds {count} document(s); each split needs at least one.",
                "Give more text with --data.",
            )
        return least

    def _all(self) -> Iterator[str]:
        for path in self.files:
            yield from self._guarded(path)

    def _guarded(self, path: Path) -> Iterator[str]:
        """One file's documents. Raises EffprofError where it cannot be read."""
        try:
            yield from _read(path)
        except (OSError, EOFError, UnicodeDecodeError, ValueError) as problem:
            if isinstance(problem, EffprofError):
                raise
            raise EffprofError(
                f"Cannot read {str(path)!r}: {problem}.",
                "Repair the file or leave it out of --data.",
            ) from None


def held_out(key: int) -> bool:
    """Whether a document of that key is one in fifty."""
    return key % VALIDATION_SHARE == 0


def key_of(text: str) -> int:
    """A document's place in the split, decided by its content alone."""
    digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big")


def _read(path: Path) -> Iterator[str]:
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        opener: Any = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _text_field(line, path, number)
    elif path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        table = parquet.ParquetFile(path)
        names = table.schema_arrow.names
        if "text" not in names or "string" not in str(table.schema_arrow.field("text").type):
            raise EffprofError(
                f"{str(path)!r} has no column 'text' of strings.", "Rename the text column."
            )
        for batch in table.iter_batches(columns=["text"]):
            yield from (text for text in batch.column(0).to_pylist() if text)
    else:
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.count("\ufffd") > len(text) / 100:
            raise EffprofError(f"{str(path)!r} is not UTF-8 text.", "Leave it out of --data.")
        yield from _pieces(text)


def _text_field(line: str, path: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise EffprofError(
            f"Line {number} of {str(path)!r} has no string field 'text'.",
            'Each line must be a JSON object such as {"text": "…"}.',
        )
    return text.encode("utf-8", "replace").decode()  # a lone surrogate is no text


def _pieces(text: str) -> Iterator[str]:
    """A long text in documents of about PIECE characters, cut at line ends."""
    start = 0
    while len(text) - start > PIECE:
        cut = text.rfind("\n", start, start + PIECE) + 1 or start + PIECE
        yield text[start:cut]
        start = cut
    if text[start:].strip():
        yield text[start:]
