"""Rows of tokens in a seeded order whose position is a pair of numbers, or a stream with its own
state.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effprof.errors import EffprofError
from effprof.files import cannot_write, home
from effprof.plan import Plan
from effprof.trainer.documents import FileCorpus
from effprof.trainer.streams import DatasetCorpus
from effprof.units import quantity

IGNORED = -100  # transformers' label of a position without a target
_DOCUMENTS_PER_CALL = 256
_STALE = 3600.0  # seconds without a block written
_TELL = 10.0  # seconds between two lines of progress


@dataclass(slots=True)
class Batch:
    """One micro-batch: ids and labels of rows × seq_len.

    ``targets`` positions have a next token to predict.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor | None
    targets: int
    real_tokens: int

    def to(self, device: torch.device) -> Batch:
        """The same on a device; from pinned memory the host does not wait for it."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same in page-locked memory."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        ids = change(self.ids)
        labels = ids if self.labels is self.ids else change(self.labels)
        positions = None if self.positions is None else change(self.positions)
        return Batch(ids, labels, positions, self.targets, self.real_tokens)


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


def make_batch(
    ids: np.ndarray[Any, Any], lengths: Any, plan: Plan, end: int, device: torch.device
) -> Batch:
    """A micro-batch of rows; ``lengths`` are real tokens per row where rows are padded."""
    tokens = torch.tensor(ids.astype(np.int64), device=device)
    positions = None
    labels, real = tokens, ids.size
    if lengths is not None:
        places = np.arange(ids.shape[1])[None, :]
        labels = torch.tensor(
            np.where(places < lengths[:, None], ids, IGNORED).astype(np.int64), device=device
        )
        real = int(lengths.sum())
    if plan.rows == "packed-isolated":
        positions = torch.tensor(_document_positions(ids, end), device=device)
        # The first token of a document is no target of the one before it.
        labels = labels.masked_fill(positions == 0, IGNORED)
    targets = int((labels[:, 1:] != IGNORED).sum())
    return Batch(tokens, labels, positions, targets, real)


def _document_positions(ids: np.ndarray[Any, Any], end: int) -> np.ndarray[Any, Any]:
    """Positions that start again at 0 after each end-of-text token."""
    places = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    starts = np.zeros_like(ids, dtype=np.int64)
    starts[:, 1:] = np.where(ids[:, :-1] == end, places[:, 1:], 0)
    return places - np.maximum.accumulate(starts, axis=1)


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
        documents = _tokenised(corpus.documents(split), tokenizer, end)
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


def _tokenised(documents: Iterable[str], tokenizer: Any, end: int) -> Iterator[list[int]]:
    """Each document's ids, ending in the end-of-text token."""
    encode = tokenizer.backend_tokenizer.encode_batch_fast
    waiting: list[str] = []
    for text in documents:
        waiting.append(text)
        if len(waiting) == _DOCUMENTS_PER_CALL:
            yield from ([*one.ids, end] for one in encode(waiting, add_special_tokens=False))
            waiting = []
    yield from ([*one.ids, end] for one in encode(waiting, add_special_tokens=False))


def _padded(documents: Iterable[list[int]], length: int, end: int) -> Iterator[list[int]]:
    """One row per document, truncated with its end kept, padded, its length in front: the
    benchmark's rows.
    """
    for ids in documents:
        if len(ids) >= 2:  # else there is nothing to predict
            kept = _truncated(ids, length)
            yield [len(kept), *kept, *[end] * (length - len(kept))]


def _truncated(ids: list[int], length: int) -> list[int]:
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


class Batches:
    """Micro-batches without end: each epoch is a permutation of the rows, seeded by seed and
    epoch.
    """

    def __init__(self, rows: Rows, plan: Plan, seed: int, device: torch.device) -> None:
        if len(rows) < plan.micro_batch:
            raise EffprofError(
                f"The data has {len(rows)} rows of {plan.seq_len}, less than one micro-batch of "
                f"{plan.micro_batch}.",
                "Give more text with --data, or a smaller --micro-batch or --seq-len.",
            )
        self.rows, self.plan, self.seed, self.device = rows, plan, seed, device
        self.epoch, self.place = 0, 0
        self._order = self._permutation()

    def _permutation(self) -> np.ndarray[Any, Any]:
        return np.random.default_rng((self.seed, self.epoch)).permutation(len(self.rows))

    def next(self) -> Batch:
        """The next micro-batch; a rest too small for one is left for the next epoch's order."""
        if self.place + self.plan.micro_batch > len(self._order):
            self.epoch, self.place = self.epoch + 1, 0
            self._order = self._permutation()
        indices = np.sort(self._order[self.place : self.place + self.plan.micro_batch])
        self.place += self.plan.micro_batch
        return self.rows.batch(indices, self.device)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.place = state["epoch"], state["place"]
        self._order = self._permutation()


class StreamBatches:
    """Micro-batches of a streamed dataset.

    Documents are tokenised a block at a time, in the tokenizer's own threads. Its state is the
    dataset's at the block's beginning, how many of the block are used, and the tokens left over.
    """

    def __init__(
        self, corpus: DatasetCorpus, tokenizer: Any, plan: Plan, split: str, device: torch.device
    ) -> None:
        self.corpus, self.split = corpus, split
        self.tokenizer, self.plan, self.device = tokenizer, plan, device
        self.end = tokenizer.eos_token_id
        self._kept: list[Batch] = []
        self._block: list[list[int]] = []
        self.left: np.ndarray[Any, Any] = np.zeros(0, np.int32)
        self.used, self.documents = 0, 0
        self._begin()

    def next(self) -> Batch:
        """The next micro-batch. Raises EffprofError where the stream cannot be read."""
        made = [self._row() for _ in range(self.plan.micro_batch)]
        lengths = np.array([n for _, n in made]) if self.plan.rows == "padded" else None
        ids = np.stack([row for row, _ in made])
        return make_batch(ids, lengths, self.plan, self.end, self.device)

    def _row(self) -> tuple[np.ndarray[Any, Any], int]:
        length = self.plan.seq_len
        if self.plan.rows == "padded":
            kept = _truncated(self._document(), length)
            return np.array(kept + [self.end] * (length - len(kept)), np.int32), len(kept)
        parts, have = [self.left], len(self.left)
        while have < length:
            parts.append(np.array(self._document(), np.int32))
            have += len(parts[-1])
        joined = np.concatenate(parts)
        self.left = joined[length:]
        return joined[:length], length

    def _document(self) -> list[int]:
        """The ids of the next document, an end-of-text token after them."""
        while self.used == len(self._block):
            self._fill()
        self.used += 1
        return self._block[self.used - 1]

    def _fill(self) -> None:
        """Read and tokenise the next block; the stream begins again at its end."""
        self._at, self.used = self.dataset.state_dict(), 0
        documents = self.corpus.texts(self._rows, self.split)
        texts = list(itertools.islice(documents, _DOCUMENTS_PER_CALL))
        if texts:
            self.documents += len(texts)
            self._block = list(_tokenised(texts, self.tokenizer, self.end))
        elif self.documents:
            self._begin()
        else:
            raise EffprofError(
                f"The dataset {self.corpus.name!r} holds no document for {self.split}.",
                "Check name and split; of files read without --stream one is always held out.",
            )

    def _begin(self) -> None:
        """The stream from its first document: a restored one would begin where it was restored."""
        self.dataset = self.corpus.stream(self.split)
        self._rows = iter(self.dataset)
        self._at, self._block, self.used, self.documents = self.dataset.state_dict(), [], 0, 0
        self.left = np.zeros(0, np.int32)

    def state_dict(self) -> dict[str, Any]:
        return {
            "dataset": self._at,
            "used": self.used,
            "left": self.left.tolist(),
            "documents": self.documents - len(self._block),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dataset = self.corpus.stream(self.split)
        self.dataset.load_state_dict(state["dataset"])
        self._rows = iter(self.dataset)
        self.left, self.documents = np.array(state["left"], np.int32), state["documents"]
        self._block = []
        if state["used"]:
            self._fill()
        self.used = state["used"]

    def evaluation(self, batches: int) -> Iterator[Batch]:
        """The first micro-batches of the stream, read once and the same at every call."""
        if len(self._kept) < batches:
            self._begin()
            self._kept = [self.next() for _ in range(batches)]
        return iter(self._kept[:batches])
