"""Time: products are the FLOPs counted, answers move as they must, probes calibrate."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from conftest import CONFIGS
from helpers import run_cli
from hypothesis import given
from hypothesis import strategies as st

from effprof import calibration, gpus, registry
from effprof.calibration import Calibration
from effprof.estimator.estimate import estimate
from effprof.estimator.flops import attention_forward, flops
from effprof.estimator.memory import synthesize
from effprof.estimator.time import Rates, paced
from effprof.estimator.work import work
from effprof.plan import Plan
from effprof.step import work_out

CARD = "a100-80gb"
RATES = {
    "matmul": 4e11,
    "attention": 5e10,
    "traffic": 1e10,
    "decomposition": 7e10,
    "launch": 0.0,
    "dispatch": 3e-6,
    "fresh": 3e9,
}


def seconds(**changes: Any) -> float:
    time = estimate(Plan(**{"model": "130m", "gpu": CARD, **changes}), calibrated=False).time
    assert time is not None
    assert 0 < time.as_dict()["low"] < time.update < time.as_dict()["high"]
    return time.steady


@pytest.mark.parametrize("method", registry.names())
@pytest.mark.parametrize("attention", ["sdpa", "math"])
def test_products_are_the_flops_counted(method: str, attention: str) -> None:
    """Forward's and backward's products and full attention sum to what `flops` counts."""
    plan = Plan(model="60m", method=method, attention=attention)
    step = work_out(plan)
    found = work(step, synthesize(step), gpus.gpu(CARD))
    products = found["forward"].flops() + found["backward"].flops()
    if attention == "sdpa":  # in a kernel of its own
        products += 3 * attention_forward(step.architecture, plan.positions, plan.seq_len)
    assert products == pytest.approx(flops(step).executed, rel=1e-9)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_products_of_every_architecture(
    kind: str, checkpointing: str, configs: dict[str, str]
) -> None:
    attention = "eager" if kind == "gemma2" else "sdpa"
    plan = Plan(
        model=configs[kind],
        micro_batch=2,
        seq_len=64,
        checkpointing=checkpointing,
        attention=attention,
    )
    step = work_out(plan)
    found = work(step, synthesize(step), gpus.gpu(CARD))
    products = found["forward"].flops() + found["backward"].flops()
    if attention == "sdpa":
        times = 4 if checkpointing == "full" else 3
        products += times * attention_forward(step.architecture, plan.positions, plan.seq_len)
    assert products == pytest.approx(flops(step).executed, rel=1e-9)
    time = estimate(
        Plan(model=configs[kind], seq_len=64, attention=attention, gpu=CARD), calibrated=False
    ).time
    assert time is not None


def test_gradients_are_added_once_for_each_later_micro_step() -> None:
    def traffic(accumulation: int) -> float:
        step = work_out(Plan(model="60m", grad_accum=accumulation))
        return work(step, synthesize(step), gpus.gpu(CARD))["backward"].traffic

    assert traffic(8) - traffic(4) == pytest.approx(4 / 2 * (traffic(4) - traffic(2)))


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--gpu", "mem=24GB,bw=1TB/s"), "no bf16 peak"),
        (("--gpu", "mem=24GB,bf16=165T"), "no bandwidth"),
        (("--gpu", "rtx-4090", "--compile"), "--compile"),
        (("--gpu", "gb10"), "no bf16 peak"),
    ],
)
def test_an_unknown_time_says_why(flags: tuple[str, ...], why: str) -> None:
    assert why in run_cli("estimate", "--model", "60m", *flags)[1]


def test_a_card_without_bf16_units_is_said() -> None:
    out = run_cli("estimate", "--model", "60m", "--gpu", "t4")[1]
    assert "fp32" in out
    assert "no bf16 units" in out


@pytest.mark.parametrize("method", registry.names())
def test_every_method_has_a_time(method: str) -> None:
    time = estimate(Plan(model="130m", method=method, gpu=CARD), calibrated=False).time
    assert time is not None
    assert all(value >= 0 for value in time.phases.values())
    turns = hasattr(registry.method(method).update, "turns")  # a block's backward is a short one
    least = 0.3 if turns else 1.0
    assert least < time.phases["backward"] / time.phases["forward"] < 4
    assert time.mfu is not None
    assert 0.02 < time.mfu < 0.8


def test_it_moves_as_it_must() -> None:
    base = seconds()
    assert seconds(micro_batch=32) > 1.5 * base
    assert seconds(model="350m") > base
    assert seconds(checkpointing="full") > 1.15 * base
    assert seconds(gpu="h100-80gb") < base < seconds(gpu="rtx-4090") < seconds(gpu="rtx-3060")
    assert 3.6 * base < seconds(grad_accum=4) < 4.2 * base
    assert seconds(attention="eager") > base
    assert seconds(dtype="fp32") > 3 * base
    assert seconds(gpu="mem=80GB,bw=2TB/s,bf16=312T") == pytest.approx(base, rel=0.05)


def test_an_svd_costs_more_than_its_flops() -> None:
    """1b on an A100: GaLore's refresh, amortised over 200 updates, beside AdamW's .036 s (APOLLO's
    table: .371 s a step with it).
    """
    time = estimate(Plan(model="1b", method="galore", gpu=CARD), calibrated=False).time
    assert time is not None
    assert 0.2 < time.phases["refresh"] + time.phases["update"] < 0.5


@given(
    micro_batch=st.integers(1, 64),
    method=st.sampled_from(registry.names()),
    card=st.sampled_from(sorted(gpus.catalog())),
)
def test_no_plan_breaks_it(micro_batch: int, method: str, card: str) -> None:
    found = estimate(Plan(model="9m", method=method, micro_batch=micro_batch, gpu=card))
    document = json.loads(json.dumps(found.as_dict()))
    time = document["time"]
    assert (time is None) == (gpus.gpu(card).peak("bf16") is None)
    assert time is None or time["tokens_per_second"] > 0


def test_without_a_card_there_is_none() -> None:
    assert estimate(Plan(model="60m")).time is None
    assert estimate(Plan(model="60m", gpu="mem=24GB")).time is None
    assert estimate(Plan(model="60m", gpu=CARD, compile=True)).time is None
    assert estimate(Plan(model="60m", device="cpu"), calibrated=False).time is None


def test_a_run_has_hours_energy_and_a_cost() -> None:
    flags = ("--model", "1b", "--gpu", "rtx-4090", "--tokens", "1B", "--global-batch", "512")
    flags += ("--micro-batch", "8", "--price-per-hour", "0.5")
    document = json.loads(run_cli("estimate", *flags, "--json")[1])
    time = document["time"]
    updates = -(-(10**9) // (512 * 256))
    assert time["run_seconds"] == pytest.approx(updates * time["update_seconds"])
    assert time["run_joules"] == pytest.approx(time["run_seconds"] * 450)
    assert time["run_cost"] == pytest.approx(time["run_seconds"] / 7200)
    out = run_cli("estimate", *flags)[1]
    assert "per hour" in out
    # A command to paste is one line, however long.
    assert all(len(line) <= 100 for line in out.splitlines() if not line.startswith("Next:"))


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("--price-per-hour", "1"), "--tokens"),
        (("--price-per-hour", "nan", "--tokens", "1B"), "1.99"),
        (("--price-per-hour", "1", "--tokens", "1B"), "--gpu"),
    ],
)
def test_a_price_without_effect(arguments: tuple[str, ...], hint: str) -> None:
    code, out, err = run_cli("estimate", "--model", "60m", *arguments)
    assert (code, out) == (2, "")
    assert hint in err


def test_measured_rates_replace_the_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a plan's own pace, its estimate is what was measured of it."""
    plan = Plan(model="9m", device="cpu", micro_batch=4)
    own = dataclasses.asdict(paced(plan, Rates(**RATES), 0.5))
    efficiency = {f"{name}_bf16": own[name] for name in (*RATES, "pace")}
    found = Calibration("x", 1, "2026-11-22", efficiency=efficiency)
    monkeypatch.setattr(calibration, "of", lambda card: found)
    time = estimate(plan).time
    assert time is not None
    assert time.measured
    assert time.steady == pytest.approx(0.5)
    assert estimate(Plan(model="9m", device="cpu", dtype="fp32")).time is None  # not measured


@pytest.mark.parametrize(
    ("model", "micro_batch", "steady", "slower"),
    [("9m", 1, 0.2, "dispatch"), ("1b", 16, 2.0, "pace"), ("1b", 16, 0.5, "pace")],
)
def test_a_gpu_that_waited_for_its_host_says_nothing_of_the_device(
    model: str, micro_batch: int, steady: float, slower: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = Rates(2e14, 1e14, 1e12, 1e12, launch=2e-6, dispatch=4e-6)
    plan = Plan(model=model, micro_batch=micro_batch, gpu=CARD)
    own = paced(plan, rates, steady)
    changed = [
        name for name, value in dataclasses.asdict(rates).items() if value != getattr(own, name)
    ]
    assert changed == [slower]
    names = ("matmul", "attention", "traffic", "decomposition", "launch", "dispatch", "pace")
    efficiency = {f"{name}_bf16": float(getattr(own, name)) for name in names}
    found = Calibration(CARD, 1, "2026-11-22", efficiency=efficiency)
    monkeypatch.setattr(calibration, "of", lambda card: found)
    time = estimate(plan).time
    assert time is not None
    assert time.steady == pytest.approx(steady)


def test_a_probe_calibrates_the_cpu(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFPROF_HOME", str(tmp_path))
    flags = ("--model", "9m", "--micro-batch", "2", "--seq-len", "64", "--device", "cpu")
    assert json.loads(run_cli("estimate", *flags, "--json")[1])["time"] is None
    probed = json.loads(run_cli("probe", *flags, "--seconds", "1", "--json")[1])
    document = json.loads(run_cli("estimate", *flags, "--json")[1])
    time, measured = document["time"], probed["measured"]["step_seconds"]["median"]
    assert time["steady_seconds"] == pytest.approx(measured, rel=1e-6)
    assert document["calibration"]["probes"] == 1
    assert "calibrated by 1 probe" in run_cli("estimate", *flags)[1]
    validated = run_cli("validate", *flags, "--seconds", "0", "--no-store")[1]
    assert "update" in validated
