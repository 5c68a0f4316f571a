"""Documents that are read as they come: a dataset by name, or local shards."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from effprof.errors import EffprofError, UsageError
from effprof.trainer.documents import FileCorpus, held_out, key_of


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
