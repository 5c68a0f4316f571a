"""The chunked loss: the standard loss and gradients without its logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import small

from effprof.errors import UsageError
from effprof.estimator.estimate import estimate
from effprof.plan import Plan
from effprof.trainer.build import build
from effprof.trainer.evaluate import evaluate
from effprof.trainer.step import backward, forward_loss
from effprof.trainer.synthetic import random_batch

Gradients = dict[str, torch.Tensor]


def gradients(loss: str, dtype: str, tiny: str, **values: Any) -> tuple[float, Gradients]:
    """The loss and every gradient of one batch, in fp64 for comparison."""
    plan = small(tiny, "full", loss=loss, dtype=dtype, micro_batch=8, seq_len=64, **values)
    assert plan.loss_rows < plan.positions
    torch.manual_seed(0)
    batch = random_batch(plan, torch.device("cpu"))
    model, _ = build(plan)
    found = forward_loss(model, batch, plan)
    backward(found * 0.5, plan)
    made = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    return found.item(), made


@pytest.mark.parametrize("rows", ["packed", "padded", "packed-isolated"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral"])
def test_equal_in_fp32(rows: str, name: str, configs: dict[str, str]) -> None:
    one, expected = gradients("standard", "fp32", configs[name], rows=rows)
    other, made = gradients("chunked", "fp32", configs[name], rows=rows)
    assert other == pytest.approx(one, rel=1e-6)
    assert made.keys() == expected.keys()
    for key, value in made.items():
        torch.testing.assert_close(value, expected[key], rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", ["bf16", "amp-bf16"])
def test_as_near_to_the_exact_gradient_as_the_standard_loss(dtype: str, tiny: str) -> None:
    one, expected = gradients("standard", dtype, tiny)
    other, made = gradients("chunked", dtype, tiny)
    assert other == pytest.approx(one, rel=1e-5)  # torch's own would round it to bf16: 4e-3
    for key, value in made.items():
        assert (value - expected[key]).norm() <= 0.015 * expected[key].norm()


def test_evaluation_forms_no_gradient(tiny: str) -> None:
    plans = [small(tiny, "full", loss=loss) for loss in ("standard", "chunked")]
    found = []
    for plan in plans:
        torch.manual_seed(0)
        batch = random_batch(plan, torch.device("cpu"))
        found.append(evaluate(build(plan)[0], [batch], plan).loss)
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_what_it_saves_is_estimated() -> None:
    standard, chunked = (
        estimate(Plan(model="60m", loss=loss)).memory.peak.size for loss in ("standard", "chunked")
    )
    assert standard - chunked > 1.2 * 2**30


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("llama", {"keep_logits": True}, "no logits"),
        ("gemma2", {"attention": "eager"}, "caps"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    name: str, values: dict[str, Any], said: str, configs: dict[str, str]
) -> None:
    with pytest.raises(UsageError, match=said):
        Plan(model=configs[name], loss="chunked", **values)
