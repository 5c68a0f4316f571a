"""What a device reaches in each class of kernel, measured alone: a second or two.

These are the constants of ``estimator/time.py``; a probe keeps them beside its step time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from effprof.estimator.work import TRAFFIC
from effprof.plan import Plan
from effprof.trainer.layer import DTYPES

_MIB = 2**20
_ROUNDS = 5
_LEAST = 0.02  # seconds that one round should take
_SVD_SIDE = 512


def measured(plan: Plan, device: torch.device) -> dict[str, float]:
    """Rates in FLOP/s, bytes/s and seconds, at shapes of this plan."""
    clock = _Clock(device)
    dtype = DTYPES[plan.compute_dtype]
    found = {
        "matmul": _matmul(plan, dtype, clock),
        "attention": _attention(plan, dtype, clock),
        "traffic": _traffic(plan, dtype, clock),
        "decomposition": _decomposition(clock),
    }
    host, busy = _per_kernel(clock)
    found |= {"dispatch": host, "launch": busy}
    if device.type == "cpu":
        found["fresh"] = _fresh(clock)
    return found


class _Clock:
    """Seconds of one call, the median of a few rounds of several."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object]) -> float:
        call()
        once = self._round(call, 1)
        calls = min(max(int(_LEAST / max(once, 1e-7)), 1), 10_000)
        return statistics.median(self._round(call, calls) / calls for _ in range(_ROUNDS))

    def _round(self, call: Callable[[], object], times: int) -> float:
        self.synchronise()
        began = time.perf_counter()
        for _ in range(times):
            call()
        self.synchronise()
        return time.perf_counter() - began


def _matmul(plan: Plan, dtype: torch.dtype, clock: _Clock) -> float:
    """Of the MLP's widest product and attention's square one, forward and both gradients."""
    shape, tokens = plan.architecture, min(plan.positions, 8192)
    flops = seconds = 0.0
    for rows in (shape.intermediate, shape.hidden):
        x = torch.randn(tokens, shape.hidden, device=clock.device).to(dtype)
        weight = torch.randn(rows, shape.hidden, device=clock.device).to(dtype)
        grad = torch.randn(tokens, rows, device=clock.device).to(dtype)

        def products(x: Tensor = x, weight: Tensor = weight, grad: Tensor = grad) -> None:
            torch.mm(x, weight.t())
            torch.mm(grad, weight)
            torch.mm(grad.t(), x)

        flops += 6.0 * tokens * rows * shape.hidden
        seconds += clock.seconds(products)
    return flops / seconds


def _attention(plan: Plan, dtype: torch.dtype, clock: _Clock) -> float:
    """A causal forward and backward; FLOPs of half the square, 3.5 times the forward's."""
    shape = plan.architecture
    size = (min(plan.micro_batch, 16), shape.heads, plan.seq_len, shape.head_dim)
    query, key, value = (
        torch.randn(size, device=clock.device).to(dtype).requires_grad_() for _ in range(3)
    )
    out_grad = torch.randn(size, device=clock.device).to(dtype)

    def both() -> None:
        out = scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.autograd.grad(out, (query, key, value), out_grad)

    flops = 3.5 * 2.0 * size[0] * size[1] * size[2] ** 2 * size[3]
    return flops / clock.seconds(both)


def _traffic(plan: Plan, dtype: torch.dtype, clock: _Clock) -> float:
    """The elementwise kernels of a decoder layer, forward and backward: RMSNorm, the gated
    activation, a residual; bytes as ``estimator/work.py`` counts them, by what they allocate.
    """
    shape, tokens = plan.architecture, min(plan.positions, 4096)
    hidden = torch.randn(tokens, shape.hidden, device=clock.device).to(dtype).requires_grad_()
    gate, up = (
        torch.randn(tokens, shape.intermediate, device=clock.device).to(dtype).requires_grad_()
        for _ in range(2)
    )
    weight = torch.ones(shape.hidden, dtype=dtype, device=clock.device, requires_grad=True)
    grads = torch.randn_like(hidden), torch.randn_like(gate)

    def layer() -> None:
        wide = hidden.float()
        normed = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)
        gated = silu(gate) * up
        torch.autograd.grad((normed + hidden, gated), (hidden, gate, up, weight), grads)

    item = dtype.itemsize
    # Allocated per number of the hidden state: 3 fp32 and 3 of dtype forward, 6 and 3 backward;
    # per number of the activation: 2 forward, 3 backward.
    allocated = tokens * shape.hidden * (9 * 4 + 6 * item) + tokens * shape.intermediate * 5 * item
    return TRAFFIC * allocated / clock.seconds(layer)


def _fresh(clock: _Clock) -> float:
    """First touch of pages: a large tensor made and written, less one written again."""
    count = 128 * _MIB
    kept = torch.zeros(count, dtype=torch.uint8)
    again = clock.seconds(lambda: kept.fill_(1))
    anew = clock.seconds(lambda: torch.empty(count, dtype=torch.uint8).fill_(1))
    return count / max(anew - again, 1e-6)


def _per_kernel(clock: _Clock) -> tuple[float, float]:
    """Seconds per kernel: of the host, and of a device that runs a long queue of tiny ones."""
    one = torch.ones(8, device=clock.device)
    busy = clock.seconds(lambda: one + one)
    if clock.device.type == "cpu":
        return busy, 0.0
    clock.synchronise()
    began = time.perf_counter()
    for _ in range(500):  # fits the launch queue: the host does not wait
        _ = one + one
    host = (time.perf_counter() - began) / 500
    clock.synchronise()
    return host, min(busy, host)


def _decomposition(clock: _Clock) -> float:
    matrix = torch.randn(_SVD_SIDE, _SVD_SIDE, device=clock.device)
    flops = 22.0 * _SVD_SIDE**3  # 14 q p^2 + 8 p^3, as methods/_projection.py counts it
    return flops / clock.seconds(lambda: torch.linalg.svd(matrix, full_matrices=False))
