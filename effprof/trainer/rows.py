"""Rows of tokens: a split's text, tokenised once and kept on the disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effprof.errors import EffprofError
from effprof.files import cannot_write, home
from effprof.plan import Plan
from effprof.trainer.batch import Batch, make_batch
from effprof.trainer.documents import FileCorpus
from effprof.units import quantity

DOCUMENTS_PER_CALL = 256  # of the tokenizer, whose threads share them
_STALE = 3600.0  # seconds without a block written
_TELL = 10.0  # seconds between two lines of progress


class Rows:
    """Tokenised rows of one split, indexable; ``ids`` is rows × seq_len of int32."""

    def __init__(
        self, ids: np.ndarray[Any, Any], plan: Plan, end: int, lengths: Any = None
    ) -> None:
        self.ids, self.plan, self.end, self.lengths = ids, plan, end, lengths

    def __len__(self) -> int:
        return len(self.ids)

    def evaluation(self, batches: int, device: torch.device) -> Iterator[Batch]:
        """The rows in their own order, the last micro-batch perhaps smaller."""
        size = self.plan.micro_batch
        for start in range(0, len(self), size)[:batches]:
            yield self.batch(np.arange(start, min(start + size, len(self))), device)

    def batch(self, indices: Any, device: torch.device) -> Batch:
        """The rows of these indices as a micro-batch on ``device``."""
        lengths = None if self.lengths is None else self.lengths[indices]
        return make_batch(self.ids[indices], lengths, self.plan, self.end, device)


def rows(
    corpus: FileCorpus,
    tokenizer: Any,
    plan: Plan,
    split: str,
    check: Callable[[], None] = lambda: None,
) -> Rows:
    """A split's rows, tokenised once and cached; ``check`` is called often meanwhile.

    Raises EffprofError where the data is too small.
    """
    end = tokenizer.eos_token_id
    padded = plan.rows == "padded"
    words = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]
    key = f"{corpus.fingerprint()}-{words}-{split}" + (f"-padded{plan.seq_len}" if padded else "")
    size = max(len(tokenizer), plan.seq_len + 1 if padded else 0)
    dtype = np.dtype(np.uint16 if size <= 2**16 else np.int32)
    cached = home() / "tokens" / f"{key}.{dtype}"
    if not cached.exists():
        sys.stderr.write(f"Tokenising the {split} split (once) …\n")
        documents = tokenised(corpus.documents(split), tokenizer, end)
        documents = _padded(documents, plan.seq_len, end) if padded else documents
        _save(cached, documents, dtype, check)
    flat = np.zeros(0, dtype)
    if cached.stat().st_size:
        flat = np.memmap(cached, dtype, mode="r")
    width = plan.seq_len + 1 if padded else plan.seq_len  # a padded row carries its length in front
    count = len(flat) // width
    if count < 1:
        raise EffprofError(
            f"The {split} split of {corpus.name!r} has {len(flat)} tokens, less than one row of "
            f"{plan.seq_len}.",
            "Give more text with --data or a smaller --seq-len.",
        )
    table = flat[: count * width].reshape(count, width)
    if padded:
        return Rows(table[:, 1:], plan, end, lengths=table[:, 0])
    return Rows(table, plan, end)


def tokenised(documents: Iterable[str], tokenizer: Any, end: int) -> Iterator[list[int]]:
    """Each document's ids, ending in the end-of-text token."""
    encode = tokenizer.backend_tokenizer.encode_batch_fast
    waiting: list[str] = []
    for text in documents:
        waiting.append(text)
        if len(waiting) == DOCUMENTS_PER_CALL:
            yield from ([*one.ids, end] for one in encode(waiting, add_special_tokens=False))
            waiting = []
    yield from ([*one.ids, end] for one in encode(waiting, add_special_tokens=False))


def _padded(documents: Iterable[list[int]], length: int, end: int) -> Iterator[list[int]]:
    """One row per document, truncated with its end kept, padded, its length in front: the
    benchmark's rows.
    """
    for ids in documents:
        if len(ids) >= 2:  # else there is nothing to predict
            kept = truncated(ids, length)
            yield [len(kept), *kept, *[end] * (length - len(kept))]


def truncated(ids: list[int], length: int) -> list[int]:
    """A document of at most ``length`` tokens that still ends in its end-of-text token."""
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]


def _save(
    path: Path,
    documents: Iterable[list[int]],
    dtype: np.dtype[Any],
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write ids end to end as they come, under a temporary name. Raises EffprofError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    told, count = time.monotonic(), 0
    for old in path.parent.glob(f".{path.name}.*"):  # of a process that was killed
        with contextlib.suppress(FileNotFoundError):
            if time.time() - old.stat().st_mtime > _STALE:
                old.unlink()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            for ids in documents:
                file.write(np.asarray(ids, dtype).tobytes())
                count += len(ids)
                check()
                if time.monotonic() - told > _TELL:
                    told = time.monotonic()
                    sys.stderr.write(f"… {quantity(count)} tokens\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as problem:
        temporary.unlink(missing_ok=True)
        if isinstance(problem, OSError):
            raise cannot_write(path, problem) from None
        raise
