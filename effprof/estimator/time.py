"""How long an update takes: each product on its roofline, the rest by its bytes, and launches.

Every rate is a named constant with its source, replaced by what a probe measured on the card. What
is not in it: input pipelines, and what ``--compile`` fuses.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from effprof.estimator.flops import UpdateFlops
from effprof.estimator.memory import no_collector, synthesize
from effprof.estimator.network import Traffic, rate_of, traffic
from effprof.estimator.work import Work, work
from effprof.gpus import DEFAULT, Gpu
from effprof.plan import Plan
from effprof.step import Step, work_out
from effprof.tape import Tape

# What cuBLAS reaches of the dense peak in the products of a training step: large square products
# reach 0.85 on an A100 and 0.79 on an H100 (public PyTorch matmul tables), a step's about nine
# tenths of that.
MATMUL = 0.75
# Turing's small boards are held back by their power limit: a T4 (70 W) runs cuBLAS at 0.4.
MATMUL_POWER = 0.4
# FlashAttention-2's forward and backward, causal: its paper, figures 4 and 6 (A100), between 512
# and 16k positions. On Hopper it reaches 0.35 forward (FlashAttention-3's abstract), less backward.
ATTENTION = 0.45
ATTENTION_HOPPER = 0.25
# Of the memory's peak: what PyTorch's elementwise kernels stream.
BANDWIDTH = 0.85
# FLOP/s of cuSOLVER's SVD by 14 q p² + 8 p³: APOLLO's table of A100 steps (GaLore at 1b .371 s with
# a refresh every 200, at 7b 2.874 s, AdamW .036 and .173) gives 0.7e12 and 0.9e12. Its panels are
# bound by latency, so other cards are taken to be as fast.
DECOMPOSITION = 0.8e12
LAUNCH = 3e-6  # seconds between two kernels of a busy stream
DISPATCH = 8e-6  # seconds of the host per kernel: Python, autograd and the dispatcher
HOST_SLOWER = 2.0  # a model's Python per kernel over that of one addition, about
# Nine of ten published runs on an A100 or H100 lie within (benchmarks/throughput.py), and of the
# CPU runs after one probe (benchmarks/time_accuracy.py). Other cards have no such test.
SPREAD = 0.25
SPREAD_UNSEEN = 0.5
_SEEN = (8.0, 9.0)  # compute capabilities
# Below compute capability 8 there is no flash kernel, in fp32 none on any card: attention runs at
# half of what products do there.
ATTENTION_OLD = 0.5


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device reaches, by class of kernel.

    ``matmul``, ``attention`` and ``decomposition`` in FLOP/s, ``traffic`` and ``fresh`` (first
    touch of new pages, CPU only) in bytes/s, ``launch`` in seconds per kernel on the device,
    ``dispatch`` in seconds per kernel on the host, which a GPU does not wait for. ``pace`` is a
    whole step's seconds over those of its kernels measured alone: caches, clocks, other tenants;
    on a GPU the device's.
    """

    matmul: float
    attention: float
    traffic: float
    decomposition: float
    launch: float
    dispatch: float
    fresh: float | None = None
    pace: float = 1.0
    measured: bool = False


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds of one optimizer update: by phase (refresh amortised, communication as far as
    nothing hides it), with the error to expect.

    ``mfu`` is dense-equivalent FLOPs and ``utilisation`` executed ones over ``peak``, the card's
    dense FLOP/s of products in ``units``: its compute dtype, or fp32 where it has no bf16 units.
    """

    gpu: str
    phases: Mapping[str, float]
    positions: int
    spread: float
    mfu: float | None
    utilisation: float | None
    peak: float | None
    units: str
    run_updates: int | None
    power: float | None  # of all GPUs
    measured: bool
    gpus: int = 1
    network: Traffic | None = None

    @property
    def update(self) -> float:
        """Seconds of one update, periodic work included in the mean."""
        return sum(self.phases.values())

    @property
    def steady(self) -> float:
        """Seconds of an update without periodic work."""
        return self.update - self.phases["refresh"]

    @property
    def run(self) -> float | None:
        """Seconds of the whole run, where the plan has a token budget."""
        return None if self.run_updates is None else self.run_updates * self.update

    def cost(self, price: float | None) -> float | None:
        """What the run costs where an hour of one GPU has this price."""
        return None if self.run is None or not price else self.run / 3600 * price * self.gpus

    def as_dict(self, price: float | None = None) -> dict[str, Any]:
        """The JSON object: seconds, tokens per second, joules (at the cards' board power), and what
        the run costs at a card's price per hour.
        """
        low, high = self.update * (1 - self.spread), self.update * (1 + self.spread)
        return {
            "gpu": self.gpu,
            "update_seconds": self.update,
            "steady_seconds": self.steady,
            "low": low,
            "high": high,
            "phases": dict(self.phases),
            "tokens_per_second": self.positions / self.update,
            "mfu": self.mfu,
            "utilisation": self.utilisation,
            "mfu_peak": self.peak,
            "mfu_units": self.units,
            "run_seconds": self.run,
            "run_joules": None if self.run is None or not self.power else self.run * self.power,
            "run_cost": self.cost(price),
            "measured_rates": self.measured,
            "communication": None if self.network is None else self.network.as_dict(),
        }


def time(step: Step, tape: Tape, card: Gpu, count: UpdateFlops) -> Time | None:
    """The time of a plan's update on a card; None where it is ``unknown``."""
    plan = step.plan
    rates = rates_of(card, plan)
    if unknown(card, plan) or rates is None:
        return None
    found = work(step, tape, card)
    on_cpu = plan.device == "cpu"
    phases = {name: seconds(one, rates, on_cpu=on_cpu) for name, one in found.items()}
    network = None
    if plan.gpus > 1:
        network = traffic(step, card, phases)
        phases["communication"] = network.exposed
    update, peak = sum(phases.values()), None if on_cpu else card.peak(plan.compute_dtype)
    positions = plan.global_batch * plan.seq_len
    old = plan.compute_dtype == "bf16" and card.lacks_bf16
    return Time(
        card.name,
        phases,
        positions,
        SPREAD if rates.measured or card.capability in _SEEN else SPREAD_UNSEEN,
        count.dense_equivalent / plan.gpus / update / peak if peak else None,
        count.executed / plan.gpus / update / peak if peak else None,
        peak,
        "fp32" if old else plan.compute_dtype,
        None if plan.tokens is None else -(-plan.tokens // positions),
        None if on_cpu or card.power is None else card.power * plan.gpus,
        rates.measured,
        plan.gpus,
        network,
    )


def unknown(card: Gpu, plan: Plan) -> str:
    """Why a plan's time is not known on a card; empty where it is."""
    if plan.compile:
        return "what --compile fuses is not modelled"
    if plan.gpus > 1 and (plan.device == "cpu" or rate_of(card) is None):
        return "how fast its processes speak to one another is not known"
    if rates_of(card, plan) is not None:
        return ""
    if plan.device == "cpu":
        return f"no probe has measured {plan.compute_dtype} on this CPU: effprof probe does"
    missing = [] if card.peak(plan.compute_dtype) else [f"{plan.compute_dtype} peak"]
    missing += [] if card.bandwidth else ["bandwidth"]
    where = "the catalog" if card.source else f"--gpu {card.name}"
    return f"{where} has no {' and no '.join(missing)}"


def paced(plan: Plan, rates: Rates, steady: float, card: Gpu = DEFAULT) -> Rates:
    """Rates at which the kernels of a plan's steady update take the seconds that were measured.

    On a GPU that waited for its host in most of them the host takes longer, else the device.
    """
    step = work_out(plan)
    with no_collector():
        found = work(step, synthesize(step, card), card)
    on_cpu = plan.device == "cpu"
    parts = [sides(one, rates, on_cpu=on_cpu) for k, one in found.items() if k != "refresh"]
    if on_cpu:
        return dataclasses.replace(rates, pace=steady / sum(map(sum, parts)))
    if sum(device for device, _ in parts) > HOST_SLOWER * sum(host for _, host in parts):
        return dataclasses.replace(rates, pace=_pace(parts, steady))
    pace = _pace([(host, device) for device, host in parts], steady)
    return dataclasses.replace(rates, dispatch=pace * rates.dispatch)


def _pace(parts: Sequence[tuple[float, float]], steady: float) -> float:
    """What the first of each pair, the longer of which counts, is to be multiplied by."""
    low, high = 1e-3, 1e3
    for _ in range(60):
        middle = math.sqrt(low * high)
        less = sum(max(middle * own, other) for own, other in parts) < steady
        low, high = (middle, high) if less else (low, middle)
    return high


def rates_of(card: Gpu, plan: Plan) -> Rates | None:
    """A card's rates: measured ones where there are, else constants times its peaks."""
    own = card.calibration.rates(plan.compute_dtype) if card.calibration else None
    if own is not None:
        return Rates(**own, measured=True)
    peak, bandwidth = card.peak(plan.compute_dtype), card.bandwidth
    if plan.device == "cpu" or peak is None or bandwidth is None:
        return None
    hopper = card.capability is not None and card.capability >= 9
    weak = card.power is not None and card.power <= 75
    matmul = peak * (MATMUL_POWER if weak else MATMUL)
    attention = peak * (ATTENTION_HOPPER if hopper else ATTENTION)
    if card.lacks_bf16 or plan.compute_dtype == "fp32":
        attention = matmul * ATTENTION_OLD
    return Rates(
        matmul=matmul,
        attention=attention,
        traffic=bandwidth * BANDWIDTH,
        decomposition=DECOMPOSITION,
        launch=LAUNCH,
        dispatch=DISPATCH,
    )


def seconds(one: Work, rates: Rates, *, on_cpu: bool) -> float:
    """One phase. On a GPU kernels wait for the host or the host for them; a CPU does both."""
    device, host = sides(one, rates, on_cpu=on_cpu)
    return device + host if on_cpu else max(device, host)


def sides(one: Work, rates: Rates, *, on_cpu: bool) -> tuple[float, float]:
    """Seconds that a phase keeps the device busy, and the host."""
    products = sum(max(flops / rates.matmul, size / rates.traffic) for flops, size in one.products)
    device = (
        products
        + one.attention / rates.attention
        + one.traffic / rates.traffic
        + one.decomposition / rates.decomposition
    )
    host = one.kernels * rates.dispatch
    if on_cpu:
        fresh = one.fresh / rates.fresh if rates.fresh else 0.0
        return rates.pace * (device + fresh), rates.pace * host
    return rates.pace * (device + one.kernels * rates.launch), host
