"""Each method against another author's implementation, or against autograd on the dense matrix."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from helpers import small
from torch import Tensor, nn

from effprof import registry
from effprof.model import Matrix
from effprof.registry import Clock, Group
from effprof.trainer import probe_child as probe
from effprof.trainer.build import build
from effprof.trainer.step import forward_loss

SHAPES = {"square": (24, 24), "tall": (40, 24), "wide": (24, 40)}


@pytest.mark.parametrize("impl", ["fused", "foreach", "loop"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_full_is_torch_adamw_bit_for_bit(impl: str, dtype: str, tiny: str) -> None:
    plan = small(
        tiny, "full", optimizer_impl=impl, dtype=dtype, settings={"weight_decay": 0.1, "eps": 1e-6}
    )
    models = [build(plan, lr=1e-2, seed=1) for _ in range(2)]
    (model, optimizer), (other, _) = models
    switches: dict[str, Any] = {"fused": {"fused": True}, "foreach": {"foreach": True}}
    reference = torch.optim.AdamW(
        other.parameters(),
        lr=1e-2,
        weight_decay=0.1,
        eps=1e-6,
        **switches.get(impl, {"foreach": False}),
    )
    torch.manual_seed(0)
    for _ in range(5):
        batch = probe.random_batch(plan, torch.device("cpu"))
        for one, update in ((model, optimizer), (other, reference)):
            forward_loss(one, batch, plan).backward()
            update.step()
            update.zero_grad()
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_fp32_states_are_adamw_on_an_fp32_copy(tiny: str) -> None:
    """bf16 weights with fp32 moments: each update is fp32 AdamW's on the rounded weight."""
    half = registry.method("full").update
    settings = half.Settings(weight_decay=0.1)
    torch.manual_seed(0)
    weight = torch.randn(8, 6).bfloat16()
    matrix = Matrix("w", 8, 6, "q")
    state = {
        "step": torch.zeros(()),
        "exp_avg": torch.zeros(8, 6),
        "exp_avg_sq": torch.zeros(8, 6),
    }
    copy = nn.Parameter(weight.float())
    reference = torch.optim.AdamW([copy], lr=1e-2, weight_decay=0.1)
    for update in range(10):
        gradient = torch.randn(8, 6).bfloat16()
        group = Group(matrix, {"weight": weight}, {"weight": gradient}, state)
        half.update(group, Clock(update=update, lr=1e-2), settings)
        copy.grad = gradient.float()
        reference.step()
        copy.data = copy.data.bfloat16().float()
        torch.testing.assert_close(weight.float(), copy.data, rtol=0, atol=2**-7 * 4)
        copy.data.copy_(weight.float())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right"])
def test_galore_is_galore_torch(shape: tuple[int, int], side: str) -> None:
    """Fifty updates through two refreshes, weight decay on, to 1e-5 relative in fp32."""
    ours, theirs = _galore_run(shape, side, torch.float32)
    worst = (ours - theirs).norm() / theirs.norm()
    assert worst < 1e-5


def test_galore_in_bf16_stays_near_galore_torch() -> None:
    """bf16 rounds each step: the release's once more than ours, so only the direction can agree."""
    ours, theirs = _galore_run((40, 24), "std", torch.bfloat16)
    cosine = nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)
    assert cosine > 0.999


def _galore_run(shape: tuple[int, int], side: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from galore_torch import GaLoreAdamW
    half = registry.method("galore").update
    settings = half.Settings(rank=8, scale=0.25, refresh=20, side=side, eps=1e-6, weight_decay=0.01)
    torch.manual_seed(0)
    start, trend = torch.randn(shape), torch.randn(shape)
    matrix = Matrix("w", *shape, "q")
    ours, theirs = start.clone().to(dtype), nn.Parameter(start.clone().to(dtype))
    state = {
        tensor.name: torch.zeros(tensor.shape, dtype=dtype)
        for tensor in half.state(matrix, settings)
    }
    galore = {"rank": 8, "update_proj_gap": 20, "scale": 0.25, "proj_type": side}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = GaLoreAdamW(
            [{"params": [theirs], **galore}], lr=0.05, eps=1e-6, weight_decay=0.01
        )
    noise = torch.Generator().manual_seed(1)
    for update in range(50):
        # The same gradients for both: fed back, a rounding error may turn a singular vector around.
        gradient = (trend + 0.3 * torch.randn(shape, generator=noise)).to(dtype)
        group = Group(matrix, {"weight": ours}, {"weight": gradient}, state)
        half.update(group, Clock(update=update, lr=0.05), settings)
        theirs.grad = gradient.clone()
        reference.step()
    return (ours - start).float(), (theirs.detach() - start).float()


def test_galore_basis_is_orthonormal_and_renewed_on_schedule() -> None:
    half = registry.method("galore").update
    settings = half.Settings(rank=4, refresh=3)
    matrix = Matrix("w", 16, 12, "q")
    torch.manual_seed(0)
    weight = torch.randn(16, 12)
    state = {tensor.name: torch.zeros(tensor.shape) for tensor in half.state(matrix, settings)}
    bases = []
    for update in range(7):
        group = Group(matrix, {"weight": weight}, {"weight": torch.randn(16, 12)}, state)
        half.update(group, Clock(update=update, lr=0.1), settings)
        bases.append(state["projector"].clone())
        torch.testing.assert_close(bases[-1] @ bases[-1].t(), torch.eye(4), rtol=0, atol=1e-5)
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(bases)]
    assert changed == [False, False, True, False, False, True]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("method", ["lowrank", "sltrain"])
def test_layer_is_its_dense_matrix(method: str, shape: tuple[int, int]) -> None:
    """Forward, the input's gradient and every tensor's, against autograd on W formed densely."""
    half: Any = registry.method(method).layer
    settings = half.Settings(rank=6, alpha=12.0)
    matrix = Matrix("w", *shape, "q")
    torch.manual_seed(0)
    tensors = half.init(matrix, settings, 5)
    tensors = {
        name: torch.randn_like(value) if value.is_floating_point() else value
        for name, value in tensors.items()
    }
    x, gradient = torch.randn(10, shape[1]), torch.randn(10, shape[0])
    out, saved = half.forward(x.clone(), tensors, settings)
    d_x, d_tensors = half.backward(gradient, x, saved, tensors, settings)

    leaves = {n: v.clone().requires_grad_() for n, v in tensors.items() if v.is_floating_point()}
    dense = 2.0 * leaves["B"] @ leaves["A"]  # alpha / rank = 2
    if "indices" in tensors:
        sparse = torch.zeros(matrix.numel).index_put((tensors["indices"].long(),), leaves["values"])
        dense = dense + sparse.view(shape)
    x_leaf = x.clone().requires_grad_()
    expected = x_leaf @ dense.t()
    expected.backward(gradient)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(d_x, x_leaf.grad, rtol=1e-5, atol=1e-4)
    assert d_tensors.keys() == leaves.keys()
    for name, leaf in leaves.items():
        torch.testing.assert_close(d_tensors[name], leaf.grad, rtol=1e-5, atol=1e-4)


def test_sltrain_support_is_fixed_sorted_and_unique(tiny: str) -> None:
    half: Any = registry.method("sltrain").layer
    settings = half.Settings(rank=4, density=0.1)
    matrix = Matrix("w", 30, 20, "q")
    indices = half.init(matrix, settings, 0)["indices"]
    assert indices.dtype == torch.int32
    assert len(indices) == 60
    assert torch.equal(indices, indices.unique())
    plan = small(tiny, "sltrain")
    model, optimizer = build(plan, lr=1e-2)
    before = {n: b.clone() for n, b in model.named_buffers() if n.endswith("indices")}
    probe.one_update(model, optimizer, plan, torch.device("cpu"))
    assert before
    assert all(torch.equal(dict(model.named_buffers())[n], b) for n, b in before.items())


@pytest.mark.parametrize("method", ["lowrank", "sltrain"])
def test_init_from_dense_keeps_the_best_factors(method: str) -> None:
    half: Any = registry.method(method).layer
    settings = half.Settings(rank=6)
    torch.manual_seed(0)
    dense = torch.randn(20, 6) @ torch.randn(6, 16)
    made = half.init(Matrix("w", 20, 16, "q"), settings, 0, dense)
    torch.testing.assert_close(half.dense(made, settings), dense, rtol=1e-4, atol=1e-4)
