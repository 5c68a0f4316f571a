"""Micro-batches in a seeded order whose position is a pair of numbers, or of a stream with its own
state.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from effprof.errors import EffprofError
from effprof.plan import Plan
from effprof.trainer.batch import Batch, make_batch
from effprof.trainer.rows import DOCUMENTS_PER_CALL, Rows, tokenised, truncated
from effprof.trainer.streams import DatasetCorpus


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
            kept = truncated(self._document(), length)
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
        texts = list(itertools.islice(documents, DOCUMENTS_PER_CALL))
        if texts:
            self.documents += len(texts)
            self._block = list(tokenised(texts, self.tokenizer, self.end))
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
