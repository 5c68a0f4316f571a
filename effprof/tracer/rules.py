"""What fake kernels do not show, and what CUDA kernels do otherwise than the CPU's.

Each rule stands for one operation's overload; it runs the operation and says what else is held.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from effprof.errors import EffprofError
from effprof.gpus import Gpu
from effprof.kernels import Attention, embedding_backward
from effprof.plan import Plan
from effprof.tracer.recorder import FakeRecorder, Rule

aten = torch.ops.aten
_Args: TypeAlias = Sequence[Any]
_Kwargs: TypeAlias = Mapping[str, Any]


def rules(plan: Plan, gpu: Gpu) -> dict[Any, Rule]:
    """Every rule of a plan's trace, by operation."""
    found: dict[Any, Rule] = {
        aten._local_scalar_dense.default: _scalar,
        aten.index.Tensor: _index,
        aten._linalg_svd.default: _svd,
        aten._grouped_mm.default: _grouped,
        aten._to_copy.default: _cast,
        aten.add.Tensor: _engine_sum,
    }
    if plan.device == "cpu":
        found[aten.linalg_vector_norm.default] = _norm
    else:
        found |= {
            aten._scaled_dot_product_flash_attention_for_cpu.default: _attention(gpu),
            aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward(
                gpu
            ),
            aten.embedding_dense_backward.default: _embedding_backward,
            aten._softmax_backward_data.default: _softmax_backward,
        }
    return found


def casts(args: _Args, out: Any) -> list[tuple[int, str]]:
    """TensorIterator on the CPU: operands, and a result in place, that are not of the common dtype
    are held in it.
    """
    floats = [one for one in args if isinstance(one, Tensor) and one.is_floating_point()]
    tensors = [one for one in floats if one.dim()]  # a scalar tensor takes the others' dtype
    if len({one.dtype for one in tensors}) < 2 or not isinstance(out, Tensor):
        return []
    common = functools.reduce(torch.promote_types, (one.dtype for one in tensors))
    mixed = [one for one in tensors if one.dtype != common]
    if any(out is one for one in mixed):
        mixed.append(out)
    return [(one.numel() * common.itemsize, "cast") for one in mixed]


def _noted(recorder: FakeRecorder, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
    """An operation's result, on the tape before what is held beside it."""
    out = recorder.run(func, args, kwargs)
    recorder.note(out, func)
    return out


def _norm(recorder: FakeRecorder, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
    """The CPU's norm reads a copy in the dtype it sums in."""
    out = _noted(recorder, func, args, kwargs)
    if kwargs.get("dtype", args[0].dtype) != args[0].dtype:
        recorder.scratch([(args[0].numel() * out.element_size(), "norm_input")])
    return out


def _scalar(recorder: FakeRecorder, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
    """A value read on the host: True, 1 or 1.0 where a fake tensor has none."""
    try:
        return recorder.run(func, args, kwargs)
    except DataDependentOutputException:
        dtype = args[0].dtype
        recorder.ask(f"a {str(dtype).removeprefix('torch.')} value was read: answered 1")
        if dtype == torch.bool:
            return True
        return 1.0 if dtype.is_floating_point else 1


def _index(recorder: FakeRecorder, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
    """x[mask]: as if the mask held nowhere false."""
    x, indices = args
    masks = [one for one in indices if one is not None and one.dtype in (torch.bool, torch.uint8)]
    if not masks:
        return recorder.run(func, args, kwargs)
    recorder.ask("a mask selected entries: answered all of them")
    if len(masks) > 1 or len([one for one in indices if one is not None]) > 1:
        raise EffprofError(
            "This model selects entries by several masks at once, which a trace cannot size.",
            "Probe it instead.",
        )
    (mask,) = masks
    rest = x.shape[mask.dim() :]
    return recorder.run(aten.empty.memory_format, ([mask.numel(), *rest],), {"dtype": x.dtype})


def _cast(recorder: FakeRecorder, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
    """A weight in another dtype: autocast keeps it to the end of its block."""
    out = _noted(recorder, func, args, kwargs)
    if recorder.role(args[0]) == "weights" and recorder.in_forward:
        recorder.assign(out, "activations")
    return out


def _grouped(recorder: FakeRecorder, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
    """grouped_mm, which fake tensors know in bf16 only: rows by their expert's matrix (2-D × 3-D),
    or every expert's gradient (2-D × 2-D).
    """
    one, other = args[:2]
    if one.dtype == torch.bfloat16:
        return recorder.run(func, args, kwargs)
    offsets = kwargs["offs"] if "offs" in kwargs else args[2]
    shape = [one.shape[0], other.shape[-1]]
    if other.dim() == 2:
        shape = [offsets.shape[0], *shape]
    return recorder.run(aten.empty.memory_format, (shape,), {"dtype": one.dtype})


def _svd(recorder: FakeRecorder, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
    """LAPACK and cuSOLVER overwrite a copy of the matrix."""
    out = _noted(recorder, func, args, kwargs)
    recorder.scratch([(args[0].numel() * args[0].element_size(), "svd_copy")])
    return out


def _engine_sum(recorder: FakeRecorder, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
    """The engine adds in place into the first gradient if nobody else holds it; beside a subclass,
    as fake tensors are, it makes a third.
    """
    one = args[0]
    summing = recorder.in_backward and not torch.is_grad_enabled() and _asked_by_engine()
    if summing and torch._C._storage_Use_Count(one.untyped_storage()._cdata) <= _SOLE:
        return one
    return recorder.run(func, args, kwargs)


def _asked_by_engine() -> bool:
    """Whether the engine itself asks: no Python of a model's own backward is in between."""
    frame: FrameType | None = sys._getframe(3)
    for _ in range(_OWN_FRAMES):
        if frame is None or frame.f_code.co_name == "_engine_run_backward":
            break
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"


_SOLE = 2  # the gradient itself, and the storage as Python sees it
_OWN_FRAMES = 2  # of torch's own wrappers around a dispatch mode


def _shape(args: _Args, *, masked: bool) -> Attention:
    query, key = args[0], args[1]
    rows, heads, length, width = query.shape
    return Attention(rows, length, heads, key.shape[1], width, query.element_size(), masked)


def _attention(gpu: Gpu) -> Rule:
    """A fused kernel of the GPU: its log-sum-exp, and a generator's state of two numbers."""

    def rule(recorder: FakeRecorder, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
        out, lse = _noted(recorder, func, args, kwargs)
        shape = _shape(args, masked=kwargs.get("attn_mask") is not None)
        kernel = shape.kernel(gpu.capability, bf16=args[0].dtype == torch.bfloat16)
        padding = 4 * (shape.log_sum_exp(kernel) - lse.numel())
        for size, label in ((8, "philox_seed"), (8, "philox_offset"), (padding, "logsumexp")):
            if size:
                recorder.keep_beside(lse, size, label)
        return out, lse

    return rule


def _attention_backward(gpu: Gpu) -> Rule:
    def rule(recorder: FakeRecorder, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
        out = _noted(recorder, func, args, kwargs)
        shape = _shape(args[1:], masked=kwargs.get("attn_mask") is not None)
        kernel = shape.kernel(gpu.capability, bf16=args[1].dtype == torch.bfloat16)
        recorder.scratch(shape.backward(kernel))
        return out

    return rule


def _softmax_backward(recorder: FakeRecorder, func: Any, args: _Args, kwargs: _Kwargs) -> Any:
    """SoftMax.cu multiplies gradient and result into a tensor of its own."""
    out = _noted(recorder, func, args, kwargs)
    size = args[0].numel() * args[0].element_size()
    recorder.scratch([(size, "gradient_times_output")])
    return out


def _embedding_backward(recorder: FakeRecorder, func: Any, args: _Args, kwargs: _Kwargs) -> Tensor:
    out: Tensor = _noted(recorder, func, args, kwargs)
    gradient, indices, vocab = args[:3]
    recorder.scratch(embedding_backward(indices.numel(), vocab, gradient.shape[-1]))
    return out
