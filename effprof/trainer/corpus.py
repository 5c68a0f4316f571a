"""Documents to train on: files, a dataset by name, or Python's own standard library, split once
by hash.
"""

from __future__ import annotations

import functools
import glob
import gzip
import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from effprof.errors import EffprofError, UsageError

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".parquet")
VALIDATION_SHARE = 50  # one document in fifty
_DIGESTED = 2 * 2**30  # bytes
PIECE = 2**16  # characters: a long text file is several documents
_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"}


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
        their names and sizes.

        Raises EffprofError for a file that cannot be read.
        """
        sizes = [path.stat().st_size for path in self.files]
        found = hashlib.sha256()
        try:
            for path, size in zip(self.files, sizes, strict=True):
                found.update(f"{path.name}\0{size}\0".encode())
                if sum(sizes) <= _DIGESTED:
                    found.update(path.read_bytes())
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


class DatasetCorpus:
    """A Hugging Face dataset by name, streamed; ``name:config`` picks a configuration.

    Where it has no validation split, one document in fifty of the training split is held out.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @functools.cached_property
    def by_hash(self) -> bool:
        """Whether a document's hash decides its split."""
        import datasets

        path, _, config = self.name.partition(":")
        try:
            return "validation" not in datasets.get_dataset_split_names(path, config or None)
        except Exception as problem:  # noqa: BLE001 - whatever the hub or the network raises
            raise self._unreadable(problem) from None

    def fingerprint(self) -> str:
        """A stream is known by its name alone."""
        return self.name.replace("/", "--")

    def digest(self) -> str:
        """The same."""
        return self.fingerprint()

    def texts(self, rows: Iterable[Any], split: str) -> Iterator[str]:
        """The documents of a split among a stream's rows. Raises EffprofError."""
        wanted = split == "validation"
        try:
            for row in rows:
                text = row["text"]
                if text and not (self.by_hash and held_out(key_of(text)) != wanted):
                    yield text
        except KeyError:
            raise EffprofError(
                f"The dataset {self.name!r} has no column 'text'.", "Give another."
            ) from None
        except (OSError, EOFError, RuntimeError, ValueError) as problem:
            raise EffprofError(
                f"The dataset {self.name!r} cannot be read: {type(problem).__name__}.",
                "Check the network, or the files, and go on with --resume.",
            ) from None

    def check(self) -> dict[str, Any]:
        """Read the first row of the training split. Raises EffprofError where that fails."""
        try:
            row = next(iter(self.stream("train")), None)
        except (OSError, RuntimeError, ValueError) as problem:
            if isinstance(problem, EffprofError):
                raise
            raise EffprofError(
                f"The dataset {self.name!r} cannot be read: {type(problem).__name__}.",
                "Check the network.",
            ) from None
        if row is None or not isinstance(row.get("text"), str):
            raise EffprofError(f"The dataset {self.name!r} has no column 'text'.", "Give another.")
        return {"files": None, "bytes": None}

    def stream(self, split: str) -> Any:
        """The streaming dataset of a split. Raises EffprofError where it cannot be loaded."""
        import datasets

        path, _, config = self.name.partition(":")
        own = "train" if self.by_hash else split
        try:
            return datasets.load_dataset(path, config or None, split=own, streaming=True)
        except Exception as problem:  # noqa: BLE001 - whatever the hub or the network raises
            raise self._unreadable(problem) from None

    def _unreadable(self, problem: Exception) -> EffprofError:
        return EffprofError(
            f"Cannot load the dataset {self.name!r}: {type(problem).__name__}.",
            "Check the name and the network, or give a file or folder with --data.",
        )


class ShardCorpus(DatasetCorpus):
    """Local files of one format, streamed in their order: never all in memory, never copied."""

    by_hash = True

    def __init__(self, files: FileCorpus) -> None:
        super().__init__(files.name)
        self.files = files
        self.kind = _builder(files)

    def fingerprint(self) -> str:
        return self.files.fingerprint()

    def digest(self) -> str:
        return self.files.digest()

    def check(self) -> dict[str, Any]:
        return self.files.check()

    def stream(self, split: str) -> Any:
        import datasets

        paths = [str(path) for path in self.files.files]
        return datasets.load_dataset(self.kind, data_files=paths, split="train", streaming=True)


_BUILDERS = {".jsonl": "json", ".jsonl.gz": "json", ".parquet": "parquet"}


def _builder(files: FileCorpus) -> str:
    """What reads all of these files. Raises UsageError."""
    kinds = {
        next((kind for suffix, kind in _BUILDERS.items() if path.name.endswith(suffix)), "")
        for path in files.files
    }
    if len(kinds) != 1 or "" in kinds:
        raise UsageError(
            f"--stream cannot read {files.name!r}: shards are {', '.join(_BUILDERS)}, all alike.",
            "Leave --stream out: the text is tokenised into a file once.",
        )
    return kinds.pop()


def held_out(key: int) -> bool:
    """Whether a document of that key is one in fifty."""
    return key % VALIDATION_SHARE == 0


def key_of(text: str) -> int:
    """A document's place in the split, decided by its content alone."""
    digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big")


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
