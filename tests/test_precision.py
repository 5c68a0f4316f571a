"""Master weights, stochastic rounding, fp16, z-loss: what they keep, and what they are good for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import record, run_cli, small

from effprof import registry
from effprof.errors import UsageError
from effprof.estimator.memory import synthesize
from effprof.plan import Plan
from effprof.step import work_out
from effprof.tape import peak
from effprof.trainer import synthetic
from effprof.trainer.build import build
from effprof.trainer.layer import MethodLinear
from effprof.trainer.rounding import round_stochastically
from effprof.trainer.step import forward_loss, training_step

CPU = torch.device("cpu")
WIDE: dict[str, dict[str, Any]] = {
    "masters": {"master_weights": "fp32"},
    "stochastic": {"rounding": "stochastic", "state_dtype": "fp32"},
}


def wide(tiny: str, method: str, kind: str, **changes: Any) -> Plan | None:
    """A bf16 plan with wide updates; None where the method says that it has none."""
    values = {"dtype": "bf16", **WIDE[kind], **changes}
    update = registry.method(method).update
    everything = {"embedding", "head", "norm"} <= set(update.COVERS)
    if everything and not any(one.dtype == "state" for one in _states(method)):
        values.pop("state_dtype", None)
    if hasattr(update, "NOT_WIDE") or hasattr(registry.method(method).layer, "NOT_WIDE"):
        with pytest.raises(UsageError, match="does not go with"):
            small(tiny, method, **values)
        return None
    return small(tiny, method, **values)


def _states(method: str) -> Any:
    plan = Plan(model="9m", method=method)
    half, settings = plan.recipe.half(covered=True)
    return half.state(plan.architecture.layer_matrices()[0], settings)


@pytest.mark.parametrize("kind", WIDE)
@pytest.mark.parametrize("method", registry.names())
def test_wide_updates_keep_what_is_declared(method: str, kind: str, tiny: str) -> None:
    """Bytes held and the recorded peak are the estimate's."""
    plan = wide(tiny, method, kind, micro_batch=4, seq_len=64)
    if plan is None:
        return
    model, optimizer = build(plan)
    synthetic.one_update(model, optimizer, plan, CPU)
    optimizer.zero_grad()
    assert synthetic.resident(model, optimizer) == work_out(plan).resident()
    expected, real = peak(synthesize(work_out(plan))), peak(record(plan))
    assert expected.size == pytest.approx(real.size, rel=1e-3)
    assert expected.phase == real.phase


@pytest.mark.parametrize("method", registry.names())
def test_masters_move_as_fp32_weights_do(method: str, tiny: str) -> None:
    """Beside bf16 weights the masters take the steps of an fp32 run given the same gradients."""
    restarts = "restart_every" in registry.setting_fields(registry.method(method).addressed)
    changes = {"settings": {"restart_every": 3}} if restarts else {}
    plan = wide(tiny, method, "masters", **changes)
    if plan is None or plan.per_layer_update:
        return
    narrow, optimizer = build(plan, lr=1e-3)
    whole, other = build(small(tiny, method, **changes), lr=1e-3)
    for one, two in zip(narrow.parameters(), whole.parameters(), strict=True):
        two.data.copy_(one)
    torch.manual_seed(0)
    for _ in range(3):  # the last ends in a restart
        loss = forward_loss(narrow, synthetic.random_batch(plan, CPU), plan)
        loss.backward()  # type: ignore[no-untyped-call]
        for one, two in zip(narrow.parameters(), whole.parameters(), strict=True):
            two.grad = None if one.grad is None else one.grad.float()
        for each in (optimizer, other):
            each.step()
            each.zero_grad()
    for (name, one), two in zip(_moved(narrow), _moved(whole), strict=True):
        error = (one - two[1].bfloat16().float()).norm() / two[1].norm()
        assert error < 6e-3, name


def _moved(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every matrix in its dense form, where factors of one product may be others; else itself."""
    for path, module in model.named_modules():
        dense = module.dense() if isinstance(module, MethodLinear) else None
        if dense is not None:
            yield path, dense
        else:
            for name, one in module.named_parameters(path, recurse=False):
                yield name, one.detach().float()


def test_masters_survive_a_checkpoint(tiny: str, texts: Path, tmp_path: Path) -> None:
    common = ["train", "--model", tiny, "--data", texts, "--micro-batch", "2", "--seq-len", "32"]
    common += ["--device", "cpu", "--steps", "8", "--save-every", "4", "--method", "relora"]
    for name, flags in (
        ("masters", ["--master-weights", "fp32", "--set", "restart_every=3"]),
        ("stochastic", ["--rounding", "stochastic", "--state-dtype", "fp32"]),
    ):
        out = tmp_path / name
        assert run_cli(*common, *flags, "--out", out)[0] == 0
        whole = (out / "metrics.jsonl").read_text().splitlines()
        (out / "checkpoint-00000008" / "state.json").write_text("{")
        assert run_cli(*common, *flags, "--out", out, "--resume")[0] == 0
        again = (out / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(r)["loss"] for r in again] == [json.loads(r)["loss"] for r in whole]


def test_stochastic_rounding_keeps_the_mean() -> None:
    value = 1 + 2**-9  # a quarter of the way from 1 to the next number of bf16's
    wide = torch.full((400_000,), value)
    rounded = torch.empty(400_000, dtype=torch.bfloat16)
    round_stochastically(wide, rounded, seed=3)
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert rounded.float().mean().item() == pytest.approx(value, abs=3e-5)
    odd = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1.5, -3.0, float("nan")])
    odd = torch.cat([odd, torch.tensor([2**31 - 1], dtype=torch.int32).view(torch.float32)])
    out = torch.empty(8, dtype=torch.bfloat16)
    round_stochastically(odd.clone(), out, seed=4)
    assert out[:6].tolist() == odd[:6].tolist()
    assert out[6:].isnan().all()  # the last is CUDA's: noise on its bits would make it zero


def test_small_steps_are_not_lost(tiny: str) -> None:
    """A step below half of bf16's spacing moves nothing when rounded to the nearest."""
    moved = {}
    for name, changes in (("nearest", {"state_dtype": "fp32"}), *WIDE.items()):
        model, optimizer = build(small(tiny, "full", dtype="bf16", **changes), lr=2e-6)
        before = [p.detach().clone() for p in model.parameters()]
        torch.manual_seed(0)
        batch = synthetic.random_batch(small(tiny, "full"), CPU)
        for _ in range(40):
            training_step(model, optimizer, [batch], small(tiny, "full", dtype="bf16", **changes))
        pairs = zip(before, model.parameters(), strict=True)
        moved[name] = sum(float((new.detach() - old).abs().float().sum()) for old, new in pairs)
    assert moved["masters"] > 1.2 * moved["nearest"]
    assert moved["stochastic"] > 1.2 * moved["nearest"]


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"dtype": "fp32", "master_weights": "fp32"}, "no effect"),
        ({"dtype": "amp-bf16", "master_weights": "fp32"}, "no effect"),
        ({"dtype": "bf16", "master_weights": "fp32", "state_dtype": "fp32"}, "no effect"),
        ({"dtype": "bf16", "master_weights": "fp32", "optimizer_impl": "fused"}, "one by one"),
        ({"dtype": "bf16", "rounding": "stochastic"}, "states that are not bf16"),
        ({"dtype": "fp16", "rounding": "stochastic", "state_dtype": "fp32"}, "bf16 weights"),
        ({"z_loss": 1e-4}, "chunked"),
        ({"z_loss": 2.0, "loss": "chunked"}, "not in"),
    ],
)
def test_what_has_no_effect_is_refused(changes: dict[str, Any], fragment: str, tiny: str) -> None:
    with pytest.raises(UsageError, match=fragment):
        small(tiny, "full", **changes)


def test_z_loss_is_added_with_its_gradient(tiny: str) -> None:
    """Against autograd on whole logits; a validation leaves it out."""
    z = 1e-2
    plan = small(tiny, "full", loss="chunked", z_loss=z)
    model, _ = build(plan)
    batch = synthetic.random_batch(plan, CPU)
    loss = forward_loss(model, batch, plan)
    loss.backward()  # type: ignore[no-untyped-call]
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(input_ids=batch.ids).logits[:, :-1].float().flatten(0, 1)
    targets = batch.ids[:, 1:].flatten()
    plain = torch.nn.functional.cross_entropy(logits, targets)
    expected = plain + z * logits.logsumexp(1).square().mean()
    expected.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6)
    model.eval()
    torch.testing.assert_close(forward_loss(model, batch, plan), plain)


def test_fp16_with_a_scaled_loss(tiny: str, texts: Path, tmp_path: Path) -> None:
    """It learns, its scale is part of a checkpoint, and an overflow leaves its update out."""
    common = ["train", "--model", tiny, "--data", texts, "--micro-batch", "2", "--seq-len", "32"]
    common += ["--device", "cpu", "--steps", "12", "--save-every", "6", "--dtype", "amp-fp16"]
    common += ["--clip", "1", "--method", "galore"]
    assert run_cli(*common, "--out", tmp_path / "run")[0] == 0
    rows = _rows(tmp_path / "run")
    losses = [row["loss"] for row in rows]
    assert losses[-1] < losses[0] - 0.2
    # 65536 times the gradient is beyond fp16 at first: those updates are left out.
    assert rows[0]["grad_norm"] is None or rows[0]["grad_norm"] < 100
    state = json.loads((tmp_path / "run" / "checkpoint-00000006" / "state.json").read_text())
    assert state["scaler"]["scale"] <= 65536
    (tmp_path / "run" / "checkpoint-00000012" / "state.json").write_text("{")
    assert run_cli(*common, "--out", tmp_path / "run", "--resume")[0] == 0
    assert [row["loss"] for row in _rows(tmp_path / "run")] == losses
    for method in ("q-galore", "lomo"):
        code, _, err = run_cli(*common[:-3], "--method", method, "--out", tmp_path / "other")
        assert (code, "amp-fp16" in err or "clip" in err) == (2, True), err


def test_an_overflow_leaves_the_update_out(tiny: str) -> None:
    plan = small(tiny, "full", dtype="amp-fp16")
    model, optimizer = build(plan)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = [p.detach().clone() for p in model.parameters()]
    training_step(model, optimizer, [synthetic.random_batch(plan, CPU)], plan, scaler=scaler)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert scaler.get_scale() == 2.0**39
    assert optimizer.clock.update == 0


def _rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
