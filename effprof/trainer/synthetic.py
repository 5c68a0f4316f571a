"""An update on random tokens, and what a model and its optimizer hold after it.

Memory and time do not read the tokens: probes, traces, tests and benchmarks use these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from effprof.plan import Plan
from effprof.trainer.batch import Batch, make_batch
from effprof.trainer.layer import MethodLinear
from effprof.trainer.optimizer import MethodOptimizer
from effprof.trainer.step import training_step

if TYPE_CHECKING:
    from effprof.trainer.distributed import Engine


def one_update(
    model: nn.Module,
    optimizer: MethodOptimizer,
    plan: Plan,
    device: torch.device,
    on_phase: Callable[[str], None] = lambda phase: None,
    engine: Engine | None = None,
    batches: Sequence[Batch] | None = None,
) -> None:
    """One optimizer update, on random rows unless some are given."""
    batches = batches or [random_batch(plan, device) for _ in range(plan.grad_accum)]
    training_step(model, optimizer, batches, plan, on_phase=on_phase, engine=engine)


def random_batch(plan: Plan, device: torch.device) -> Batch:
    """Rows of random tokens as the plan lays them out."""
    size = (plan.micro_batch, plan.seq_len)
    ids = torch.randint(0, plan.architecture.vocab, size).numpy()
    ids[:, plan.seq_len // 2] = 0  # rows of two documents: isolated ones need a mask then
    lengths = np.full(plan.micro_batch, plan.seq_len) if plan.rows == "padded" else None
    return make_batch(ids, lengths, plan, 0, device)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients alive now, those that a method's layer keeps to itself included."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for path, module in model.named_modules():
        if isinstance(module, MethodLinear):
            found |= {f"{path}.{name}": one for name, one in module.gradients.items()}
    return found


def state_tensors(optimizer: MethodOptimizer) -> dict[str, Tensor]:
    """Every tensor of the optimizer's state."""
    return {
        f"{index}.{name}": tensor
        for index, state in enumerate(optimizer.state.values())
        for name, tensor in state.items()
    }


def resident(model: nn.Module, optimizer: MethodOptimizer) -> dict[str, int]:
    """Requested bytes held between updates, by role, from the tensors themselves."""

    def total(tensors: Mapping[str, Tensor]) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    return {
        "weights": total(dict(model.named_parameters())),
        "gradients": total(gradients(model)),
        "optimizer": total(state_tensors(optimizer)),
        "buffers": total(dict(model.named_buffers())),
    }
