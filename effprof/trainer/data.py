"""Rows of tokens in a seeded order whose position is a pair of numbers, or a stream with its own
state.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effprof.errors import EffprofError
from effprof.files import home, write_whole
from effprof.plan import Plan
from effprof.trainer.corpus import DatasetCorpus, FileCorpus

IGNORED = -100  # transformers' label of a position without a target
_DOCUMENTS_PER_CALL = 256


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

    def evaluation(self, batches: int | None, device: torch.device) -> Iterator[Batch]:
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


def rows(corpus: FileCorpus, tokenizer: Any, plan: Plan, split: str) -> Rows:
    """A split's rows, tokenised once and cached.

    Raises EffprofError where the data is too small.
    """
    end = tokenizer.eos_token_id
    padded = plan.rows == "padded"
    vocabulary = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]
    key = f"{corpus.fingerprint()}-{vocabulary}-{split}" + (
        f"-padded{plan.seq_len}" if padded else ""
    )
    cached = home() / "tokens" / f"{key}.npy"
    if not cached.exists():
        sys.stderr.write(f"Tokenising the {split} split (once) …\n")
        documents = _tokenised(corpus.documents(split), tokenizer, end)
        flat = _pad(documents, plan.seq_len, end) if padded else _pack(documents)
        _save(cached, flat)
    flat = np.load(cached, mmap_mode="r")
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


def _pack(documents: Iterable[list[int]]) -> np.ndarray[Any, Any]:
    parts = [np.asarray(ids, dtype=np.int32) for ids in documents]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


def _pad(documents: Iterable[list[int]], length: int, end: int) -> np.ndarray[Any, Any]:
    """One row per document, truncated with its end kept, padded, its length in front: the
    benchmark's rows.
    """
    parts = []
    for ids in documents:
        if len(ids) < 2:
            continue  # nothing to predict
        kept = _truncated(ids, length)
        parts.append(np.asarray([len(kept), *kept, *[end] * (length - len(kept))], dtype=np.int32))
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


def _truncated(ids: list[int], length: int) -> list[int]:
    """A document of at most ``length`` tokens that still ends in its end-of-text token."""
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]


def _save(path: Path, flat: np.ndarray[Any, Any]) -> None:
    import io

    buffer = io.BytesIO()
    np.save(buffer, flat)
    write_whole(path, buffer.getvalue())


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

    Its state is the dataset's own and the tokens not yet used.
    """

    def __init__(
        self, corpus: DatasetCorpus, tokenizer: Any, plan: Plan, split: str, device: torch.device
    ) -> None:
        self.corpus, self.split = corpus, split
        self.tokenizer, self.plan, self.device = tokenizer, plan, device
        self.end = tokenizer.eos_token_id
        self.left: list[int] = []
        self._begin()

    def next(self) -> Batch:
        """The next micro-batch. Raises EffprofError where the stream ends."""
        made = [self._row() for _ in range(self.plan.micro_batch)]
        lengths = np.array([n for _, n in made]) if self.plan.rows == "padded" else None
        ids = np.array([row for row, _ in made], dtype=np.int32)
        return make_batch(ids, lengths, self.plan, self.end, self.device)

    def _row(self) -> tuple[list[int], int]:
        length = self.plan.seq_len
        if self.plan.rows == "padded":
            ids = self._document()
            kept = _truncated(ids, length)
            return kept + [self.end] * (length - len(kept)), len(kept)
        while len(self.left) < length:
            self.left += self._document()
        row, self.left = self.left[:length], self.left[length:]
        return row, length

    def _document(self) -> list[int]:
        """The next document that has something to predict; the stream begins again at its end."""
        while True:
            try:
                row = next(self._rows, None)
                text = None if row is None else row["text"]
            except KeyError:
                raise EffprofError(
                    f"The dataset {self.corpus.name!r} has no column 'text'.", "Give another."
                ) from None
            except (OSError, RuntimeError, ValueError) as problem:
                raise EffprofError(
                    f"The dataset {self.corpus.name!r} cannot be read: {type(problem).__name__}.",
                    "Check the network and go on with --resume.",
                ) from None
            if row is None:
                if not self.documents:
                    raise EffprofError("The dataset holds no document.", "Check name and split.")
                self._begin()
            elif text:
                self.documents += 1
                encoded = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
                return [*encoded.ids, self.end]

    def _begin(self) -> None:
        """The stream from its first document: a restored one would begin where it was restored."""
        self.dataset = self.corpus.stream(self.split)
        self._rows = iter(self.dataset)
        self.left, self.documents = [], 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "dataset": self.dataset.state_dict(),
            "left": self.left,
            "documents": self.documents,
        }

    def evaluation(self, batches: int) -> Iterator[Batch]:
        """The first micro-batches of the stream, the same at every call."""
        self._begin()
        return (self.next() for _ in range(batches))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.dataset.load_state_dict(state["dataset"])
        self.left, self.documents = list(state["left"]), state["documents"]
        self._rows = iter(self.dataset)
