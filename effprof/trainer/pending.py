"""An update's numbers on their way from the device: read one update later, when they are there."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from effprof.trainer.batch import Batch


@dataclass
class Pending:
    """What an update was: its scalars by name, still on the device, and what the host knows.

    ``known`` goes into the metrics as it is; ``batches`` is what it was computed on, ``draw`` their
    number in the order of the data.
    """

    scalars: dict[str, Tensor]
    known: dict[str, Any]
    batches: list[Batch]
    draw: int
    began: float
    ended: float = 0.0
    _host: Tensor = field(init=False)
    _event: torch.cuda.Event | None = None

    def __post_init__(self) -> None:
        stacked = torch.stack([value.detach().float() for value in self.scalars.values()])
        if stacked.is_cuda:
            empty = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
            self._host = empty.copy_(stacked, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._host = stacked
            self.ended = time.perf_counter()

    def read(self) -> dict[str, float]:
        """The scalars' values, once the device has them; ``ended`` is then."""
        if self._event is not None:
            self._event.synchronize()
            self.ended = time.perf_counter()
        return dict(zip(self.scalars, self._host.tolist(), strict=True))
