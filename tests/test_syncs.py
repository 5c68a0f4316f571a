"""Between refreshes no update waits for its device: nothing in it reads a tensor's value."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from effprof import registry
from effprof.plan import Plan
from effprof.trainer.build import build
from effprof.trainer.step import training_step
from effprof.trainer.synthetic import random_batch

CPU = torch.device("cpu")
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"}


class Reads(TorchDispatchMode):
    """Where the host asks a tensor what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.name() in READS:
            self.places.append("".join(traceback.format_stack(limit=6)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("method", "loss"), [*((name, "standard") for name in registry.names()), ("full", "chunked")]
)
def test_an_update_reads_nothing(method: str, loss: str) -> None:
    plan = Plan(model="9m", method=method, micro_batch=1, seq_len=32, device="cpu", loss=loss)
    model, optimizer = build(plan, lr=1e-3)
    first, second = (random_batch(plan, CPU) for _ in range(2))
    training_step(model, optimizer, [first], plan)
    with Reads() as reads:
        training_step(model, optimizer, [second], plan)
    assert reads.places == []
