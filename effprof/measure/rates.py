"""What a device reaches in each class of kernel, measured alone: a few seconds.

These are the constants of ``estimator/time.py``; a probe keeps them beside its step time, for every
plan on that device. A CPU is measured at the plan's own shapes. A GPU is not: small kernels would
measure how fast the host launches them, and tensors in its cache not its memory.
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
# On a GPU: a product of a millisecond, 64 MiB and more per bf16 tensor, an SVD as 1b and 7b have.
_WIDTH, _TOKENS, _GPU_SVD_SIDE = 4096, 8192, 2048
_SCORES = 2**26  # of attention, on a GPU: more than any card works on at once
_QUEUED = 500  # kernels, which fit the launch queue: the host does not wait for the device


def measured(plan: Plan, device: torch.device) -> dict[str, float]:
    """Rates in FLOP/s, bytes/s and seconds, at shapes of this plan."""
    clock = _Clock(device)
    dtype = DTYPES[plan.compute_dtype]
    shape, large = plan.architecture, device.type == "cuda"
    hidden, wide = (_WIDTH, _WIDTH) if large else (shape.hidden, shape.intermediate)
    tokens = _TOKENS if large else plan.positions
    found = {
        "matmul": _matmul(hidden, wide, min(tokens, 8192), dtype, clock),
        "attention": _attention(plan, dtype, clock),
        "traffic": _traffic(hidden, wide, tokens if large else min(tokens, 4096), dtype, clock),
        "decomposition": _decomposition(_GPU_SVD_SIDE if large else _SVD_SIDE, clock),
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


def _matmul(hidden: int, wide: int, tokens: int, dtype: torch.dtype, clock: _Clock) -> float:
    """Of the MLP's widest product and attention's square one, forward and both gradients."""
    flops = seconds = 0.0
    for rows in dict.fromkeys((wide, hidden)):
        x = torch.randn(tokens, hidden, device=clock.device).to(dtype)
        weight = torch.randn(rows, hidden, device=clock.device).to(dtype)
        grad = torch.randn(tokens, rows, device=clock.device).to(dtype)

        def products(x: Tensor = x, weight: Tensor = weight, grad: Tensor = grad) -> None:
            torch.mm(x, weight.t())
            torch.mm(grad, weight)
            torch.mm(grad.t(), x)

        flops += 6.0 * tokens * rows * hidden
        seconds += clock.seconds(products)
    return flops / seconds


def _attention(plan: Plan, dtype: torch.dtype, clock: _Clock) -> float:
    """A causal forward and backward; FLOPs of half the square, 3.5 times the forward's."""
    shape, rows = plan.architecture, min(plan.micro_batch, 16)
    heads = shape.heads
    if clock.device.type == "cuda":
        rows = max(rows, _SCORES // (heads * plan.seq_len**2))
    size = (rows, heads, plan.seq_len, shape.head_dim)
    query, key, value = (
        torch.randn(size, device=clock.device).to(dtype).requires_grad_() for _ in range(3)
    )
    out_grad = torch.randn(size, device=clock.device).to(dtype)

    def both() -> None:
        out = scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.autograd.grad(out, (query, key, value), out_grad)

    flops = 3.5 * 2.0 * size[0] * size[1] * size[2] ** 2 * size[3]
    return flops / clock.seconds(both)


def _traffic(width: int, wide: int, tokens: int, dtype: torch.dtype, clock: _Clock) -> float:
    """The elementwise kernels of a decoder layer, forward and backward: RMSNorm, the gated
    activation, a residual; bytes as ``estimator/work.py`` counts them, by what they allocate.
    """
    hidden = torch.randn(tokens, width, device=clock.device).to(dtype).requires_grad_()
    gate, up = (
        torch.randn(tokens, wide, device=clock.device).to(dtype).requires_grad_() for _ in range(2)
    )
    weight = torch.ones(width, dtype=dtype, device=clock.device, requires_grad=True)
    grads = torch.randn_like(hidden), torch.randn_like(gate)

    def layer() -> None:
        raised = hidden.float()
        scale = torch.rsqrt(raised.pow(2).mean(-1, keepdim=True) + 1e-6)
        normed = weight * (raised * scale).to(dtype)
        gated = silu(gate) * up
        torch.autograd.grad((normed + hidden, gated), (hidden, gate, up, weight), grads)

    item = dtype.itemsize
    # Allocated per number of the hidden state: 3 fp32 and 3 of dtype forward, 6 and 3 backward;
    # per number of the activation: 2 forward, 3 backward.
    allocated = tokens * width * (9 * 4 + 6 * item) + tokens * wide * 5 * item
    return TRAFFIC * allocated / clock.seconds(layer)


def _fresh(clock: _Clock) -> float:
    """First touch of pages: a large tensor made and written, less one written again."""
    count = 128 * _MIB
    kept = torch.zeros(count, dtype=torch.uint8)
    again = clock.seconds(lambda: kept.fill_(1))
    anew = clock.seconds(lambda: torch.empty(count, dtype=torch.uint8).fill_(1))
    return count / max(anew - again, 1e-6)


def _per_kernel(clock: _Clock) -> tuple[float, float]:
    """Seconds per kernel: of the host, and of a device that runs a queue of tiny ones that had to
    wait: else it would wait for the host.
    """
    one = torch.ones(8, device=clock.device)
    busy = clock.seconds(lambda: one + one)
    if clock.device.type == "cpu":
        return busy, 0.0
    square = torch.randn(_WIDTH, _WIDTH, device=clock.device)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    clock.synchronise()
    for _ in range(4):  # 0.1 s and less, while all the others are queued
        torch.mm(square, square)
    marks[0].record()
    began = time.perf_counter()
    for _ in range(_QUEUED):
        _ = one + one
    host = (time.perf_counter() - began) / _QUEUED
    marks[1].record()
    clock.synchronise()
    return host, float(marks[0].elapsed_time(marks[1])) / 1e3 / _QUEUED


def _decomposition(side: int, clock: _Clock) -> float:
    matrix = torch.randn(side, side, device=clock.device)
    flops = 22.0 * side**3  # 14 q p^2 + 8 p^3, as methods/_projection.py counts it
    return flops / clock.seconds(lambda: torch.linalg.svd(matrix, full_matrices=False))
