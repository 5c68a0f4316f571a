"""effprof.apply and effprof.optimizer: a method on anyone's model, in anyone's loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effprof
from effprof import registry
from effprof.errors import UsageError
from effprof.trainer.layer import MethodLinear

NAMES = registry.names()


def plain_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(24, 40),
        nn.Tanh(),
        nn.LayerNorm(40),
        nn.Linear(40, 24),
        nn.Tanh(),
        nn.Linear(24, 5),
    )


def language_model(**changes: Any) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "vocab_size": 128, "num_key_value_heads": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **changes))


def fit(model: Any, optimizer: Any, updates: int = 25) -> list[float]:
    """Losses on one batch, in a loop that knows nothing of effprof."""
    torch.manual_seed(1)
    losses = []
    if hasattr(model, "config"):
        ids = torch.randint(0, 128, (4, 16))
        inputs: dict[str, Tensor] = {"input_ids": ids, "labels": ids}
    else:
        x, y = torch.randn(64, 24), torch.randint(0, 5, (64,))
    for _ in range(updates):
        if hasattr(model, "config"):
            loss = model(**inputs).loss
        else:
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def settings_of(method: str) -> dict[str, Any]:
    """A small rank, and periods short enough to come several times."""
    chosen = registry.method(method)
    fields = registry.setting_fields(chosen.addressed)
    found: dict[str, Any] = {}
    if "rank" in fields and method != "apollo-mini":
        found["rank"] = 4
    periods = ("refresh", "restart_every", "exact_every", "switch_every", "reset_every")
    found |= {name: 7 for name in periods if name in fields}
    if "restart_warmup" in fields:
        found["restart_warmup"] = 2
    return found


RATES = {"lomo": 0.3, "badam": 0.05, "adalomo": 0.05, "adafactor": 0.1}


@pytest.mark.parametrize("make", [plain_model, language_model])
@pytest.mark.parametrize("method", NAMES)
def test_every_method_trains_anyones_model(method: str, make: Any) -> None:
    model = make()
    given = settings_of(method)
    layered = registry.method(method).layer is not None
    if layered:
        effprof.apply(model, method, from_dense=method != "cola", **given)
        assert any(isinstance(module, MethodLinear) for module in model.modules())
    own = {} if layered else given
    optimizer = effprof.optimizer(
        model, method, lr=RATES.get(method, 1e-2), total_updates=50, **own
    )
    losses = fit(model, optimizer, 50)
    assert losses[-1] < losses[0] - 0.2
    assert optimizer.clock.update == 50


@pytest.mark.parametrize("method", NAMES)
def test_state_dicts_round_trip(method: str) -> None:
    runs = []
    for _ in range(2):
        model, given = plain_model(), settings_of(method)
        layered = registry.method(method).layer is not None
        if layered:
            effprof.apply(model, method, from_dense=method != "cola", **given)
        own = {} if layered else given
        runs.append((model, effprof.optimizer(model, method, lr=1e-2, total_updates=50, **own)))
    (model, optimizer), (other, second) = runs
    fit(model, optimizer, 9)
    other.load_state_dict(model.state_dict())
    second.load_state_dict(optimizer.state_dict())
    assert fit(model, optimizer, 9) == fit(other, second, 9)


@pytest.mark.parametrize("method", ["lora", "relora", "golore", "sltrain", "lowrank"])
def test_apply_starts_from_the_model(method: str) -> None:
    """The function is unchanged where the dense matrix is kept, near where factors hold it."""
    model = plain_model()
    x = torch.randn(16, 24)
    before = model(x).detach()
    effprof.apply(model, method, rank=20)
    after = model(x).detach()
    tolerance = 1e-5 if method in ("lora", "relora", "golore") else 0.4
    torch.testing.assert_close(after, before, rtol=0, atol=tolerance)


def test_only_attention_and_mlp_of_a_language_model_are_taken() -> None:
    model = effprof.apply(language_model(), "lora", rank=4)
    swapped = [n for n, m in model.named_modules() if isinstance(m, MethodLinear)]
    assert len(swapped) == 14
    assert all("self_attn" in name or "mlp" in name for name in swapped)
    assert isinstance(model.lm_head, nn.Linear)
    kinds = {m.matrix.kind: m.matrix.heads for m in model.modules() if isinstance(m, MethodLinear)}
    assert (kinds["q"], kinds["k"]) == (4, 2)


def test_leave_names_what_is_left_alone() -> None:
    model = effprof.apply(plain_model(), "lora", rank=4, leave=["0"])
    assert [isinstance(model.get_submodule(n), MethodLinear) for n in ("0", "3", "5")] == [
        False,
        True,
        True,
    ]
    with pytest.raises(UsageError, match="no linear layer of this model"):
        effprof.apply(plain_model(), "lora", rank=4, leave=["nowhere"])


@pytest.mark.parametrize(("part", "kept"), [("mlp", True), ("self_attn", False)])
def test_an_mlp_that_is_left_keeps_its_activation(part: str, kept: bool) -> None:
    model = language_model()
    mlp = model.model.layers[0].mlp
    before = mlp.act_fn
    linear = (n for n, module in model.named_modules() if isinstance(module, nn.Linear))
    leave = [name for name in linear if part in name or name == "lm_head"]
    effprof.apply(model, "cola", rank=4, leave=leave, from_dense=False, keep_activation=False)
    assert (mlp.act_fn is before) is kept


def test_an_mlp_whose_activation_is_elsewhere_is_refused() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**shape, num_attention_heads=2, vocab_size=64))
    with pytest.raises(UsageError, match="is not where effprof knows it"):
        effprof.apply(model, "cola", rank=4, from_dense=False, keep_activation=False)


def test_a_schedulers_rate_and_the_methods_factor_multiply() -> None:
    model = effprof.apply(plain_model(), "lowrank-restarts", rank=4, restart_every=5)
    optimizer = effprof.optimizer(model, "lowrank-restarts", lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    seen = []
    for _ in range(8):
        optimizer.step()
        schedule.step()
        seen.append(optimizer.param_groups[0]["lr"] * optimizer.lr_factor())
    assert seen[:4] == [0.5] * 4
    assert seen[4] == pytest.approx(0.5 * (0.001 + 0.999 / 9))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: effprof.apply(m, "lorra"), "Unknown method"),
        (lambda m: effprof.apply(m, "lora", rank=24), "not below the shorter side"),
        (lambda m: effprof.apply(m, "lora", rang=4), "rang"),
        (lambda m: effprof.apply(m, "cola", rank=4), "dense matrix"),
        (lambda m: effprof.apply(effprof.apply(m, "lora", rank=4), "lora"), "swapped already"),
        (lambda m: effprof.optimizer(m, "lora", lr=1e-3), "layers of its own"),
        (lambda m: effprof.optimizer(m, "lomo", lr=1e-3, state_dtype="8bit"), "no effect"),
        (lambda m: effprof.apply(nn.Sequential(nn.Conv1d(3, 3, 3)), "lora"), "No linear layer"),
        (
            lambda m: effprof.optimizer(
                effprof.apply(m, "golore", rank=4), "golore", lr=1e-3, per_layer_update=True
            ),
            "full gradient",
        ),
        (
            lambda m: effprof.optimizer(
                nn.Sequential(nn.Conv1d(3, 3, 3), m), "galore", lr=1e-3, rank=2, state_dtype="8bit"
            ),
            "3 dimensions",
        ),
    ],
)
def test_what_cannot_be_says_so_and_changes_nothing(call: Any, message: str) -> None:
    model = plain_model()
    with pytest.raises(UsageError, match=message):
        call(model)
    if "swapped" not in message and "gradient" not in message:
        assert not any(isinstance(module, MethodLinear) for module in model.modules())


def test_a_convolution_beside_takes_adamw() -> None:
    model = nn.Sequential(nn.Conv1d(3, 3, 3), nn.Flatten(), nn.Linear(18, 24), nn.Linear(24, 2))
    optimizer = effprof.optimizer(model, "galore", lr=1e-2, rank=4)
    x = torch.randn(8, 3, 8)
    before = model[0].weight.detach().clone()
    model(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, model[0].weight)


def test_a_layer_used_twice_is_swapped_in_both_places() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(24, 24)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(24, 5))
    x = torch.randn(4, 24)
    before = model(x).detach()
    effprof.apply(model, "lora", rank=4)
    assert model[0] is model[2]
    torch.testing.assert_close(model(x).detach(), before)


def test_tied_weights_are_refused() -> None:
    model = plain_model()
    other = nn.Linear(24, 40)
    other.weight = model[0].weight  # type: ignore[assignment]
    with pytest.raises(UsageError, match="shares its weight"):
        effprof.apply(nn.Sequential(model, other, nn.Linear(40, 2)), "lora", rank=4)


def test_a_copied_model_works_and_an_optimizer_is_not_copied() -> None:
    import copy

    model = effprof.apply(plain_model(), "sltrain", rank=4)
    other = copy.deepcopy(model)
    x = torch.randn(4, 24)
    torch.testing.assert_close(other(x), model(x))
    with pytest.raises(UsageError, match="cannot be copied"):
        copy.deepcopy(effprof.optimizer(model, "sltrain", lr=1e-3))


def test_what_the_user_froze_stays_frozen() -> None:
    model = plain_model()
    model[0].weight.requires_grad_(False)
    effprof.apply(model, "lowrank", rank=4)
    assert isinstance(model[0], nn.Linear)
    optimizer = effprof.optimizer(model, "lowrank", lr=1e-2)
    model[5].weight.requires_grad_(False)
    before = [model[i].weight.detach().clone() for i in (0, 5)]
    fit(model, optimizer, 3)
    assert all(torch.equal(a, model[i].weight) for a, i in zip(before, (0, 5), strict=True))


def test_a_second_optimizer_takes_over() -> None:
    """Blocks that wait for their turn are not frozen, and old hooks do not train on."""
    model = plain_model()
    first = effprof.optimizer(model, "badam", lr=1e-2, switch_every=1)
    second = effprof.optimizer(model, "badam", lr=1e-2, switch_every=1)
    counts = [sum(len(g["params"]) for g in one.param_groups) for one in (first, second)]
    assert counts[0] == counts[1] == 8
    model = plain_model()
    effprof.optimizer(model, "full", lr=1e9, per_layer_update=True)
    fit(model, effprof.optimizer(model, "full", lr=1e-3, per_layer_update=True), 2)
    assert all(bool((p.abs() < 10).all()) for p in model.parameters())


def test_a_state_of_another_optimizer_is_refused() -> None:
    states = []
    for method, settings in (("galore", {"rank": 4}), ("galore", {"rank": 8}), ("muon", {})):
        model = plain_model()
        optimizer = effprof.optimizer(model, method, lr=1e-3, **settings)
        fit(model, optimizer, 1)
        states.append((optimizer, optimizer.state_dict()))
    for optimizer, _ in states[1:]:
        with pytest.raises(UsageError, match="state"):
            optimizer.load_state_dict(states[0][1])
    plain = torch.optim.AdamW(plain_model().parameters())
    with pytest.raises(UsageError, match="another optimizer"):
        states[0][0].load_state_dict(plain.state_dict())
    with pytest.raises(UsageError, match="cannot be added"):
        states[0][0].add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def test_golores_full_gradient_is_seen_by_clipping() -> None:
    model = effprof.apply(plain_model(), "golore", rank=4)
    optimizer = effprof.optimizer(model, "golore", lr=1e-2)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    fitted = [m.weight for m in model.modules() if isinstance(m, MethodLinear)]
    assert all(weight in held for weight in fitted)


def test_attentions_own_linear_layers_are_left() -> None:
    encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.Sequential(encoder, nn.Linear(32, 2))
    effprof.apply(model, "lowrank", rank=4)
    assert isinstance(encoder.linear1, MethodLinear)
    assert not isinstance(encoder.self_attn.out_proj, MethodLinear)
    assert model(torch.randn(2, 5, 32)).shape == (2, 5, 2)
