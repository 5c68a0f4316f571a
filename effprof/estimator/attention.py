"""Attention over storages: SDPA's fused kernels and math backend, and transformers' eager code.

Sources: integrations/sdpa_attention.py and modeling_llama.py of transformers 5.23, torch 2.13
aten/src/ATen/native/transformers/attention.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from effprof.estimator import operations as ops
from effprof.estimator.autograd import Graph, Value
from effprof.kernels import Attention
from effprof.plan import Plan

if TYPE_CHECKING:
    from effprof.estimator.decoder import Decoder


def attend(decoder: Decoder, query: Value, key: Value, value: Value, mask: Value | None) -> Value:
    """Attention by the plan's implementation; the result is tokens × heads · head_dim."""
    graph, plan, shape = decoder.graph, decoder.plan, decoder.shape
    compute = decoder.compute
    groups = shape.heads // shape.kv_heads
    if plan.attention == "sdpa":
        query, key, value = (ops.to(graph, x, compute, "sdpa_cast") for x in (query, key, value))
        # Grouped heads and a mask are not taken together; a single one is repeated as a view.
        if mask is not None and groups > 1 and shape.kv_heads > 1:
            key, value = (ops.copy(graph, x, x.numel * groups, "repeat_kv") for x in (key, value))
            groups = 1
        shape_of = plan_attention(plan, masked=mask is not None)
        kernel = "flash" if plan.device == "cpu" else decoder.kernel(shape_of)
        if kernel != "math":
            return _fused(decoder, query, key, value, mask, shape_of, kernel)
    scores_numel = plan.positions * shape.heads * plan.seq_len
    if groups > 1:
        key, value = (ops.copy(graph, x, x.numel * groups, "repeat_kv") for x in (key, value))
    if plan.attention == "eager":
        return _eager(decoder, query, key, value, mask, scores_numel)
    return _math(decoder, query, key, value, scores_numel)


def plan_attention(plan: Plan, *, masked: bool) -> Attention:
    """What one layer asks of SDPA."""
    shape = plan.architecture
    itemsize = 4 if plan.compute_dtype == "fp32" else 2
    heads = shape.heads, shape.kv_heads, shape.head_dim
    if masked:  # repeated before, since grouped heads and a mask are not taken together
        heads = shape.heads, shape.heads, shape.head_dim
    return Attention(plan.micro_batch, plan.seq_len, *heads, itemsize, masked)


def _fused(
    decoder: Decoder,
    query: Value,
    key: Value,
    value: Value,
    mask: Value | None,
    asked: Attention,
    kernel: str,
) -> Value:
    """SDPA's fused kernels: save inputs, output, log-sum-exp, and a mask as numbers."""
    graph, plan, shape = decoder.graph, decoder.plan, decoder.shape
    out = graph.allocate(query.numel, query.itemsize, "attention")
    lse = graph.allocate(asked.log_sum_exp(kernel), 4, "logsumexp")
    saved = [query, key, value, out, lse]
    if mask is not None:
        saved.append(graph.allocate(mask.numel, query.itemsize, "mask_bias"))
    if plan.device == "cuda":
        saved += [graph.allocate(1, 8, "philox_seed"), graph.allocate(1, 8, "philox_offset")]
    sizes = [(x.numel, x.itemsize) for x in (query, key, value)]

    scratch = asked.backward(kernel) if plan.device == "cuda" else ()

    def rule(graph: Graph, gradient: Value, saved: list[Value]) -> Sequence[Value]:
        made = [graph.allocate(*size, "d_qkv") for size in sizes]
        held = [graph.allocate(size, 1, label) for size, label in scratch]
        del held
        return made

    out = graph.attach(out, "sdpa", (query, key, value), saved, rule)
    # The kernel's output follows the query's layout: phi3's concatenated query needs a transposed
    # copy.
    return ops.copy(graph, out, out.numel, "contiguous") if shape.fused else out


def _eager(
    decoder: Decoder, query: Value, key: Value, value: Value, mask: Value | None, numel: int
) -> Value:
    """transformers' eager attention: scores, scaled, masked, softmax in fp32, cast back."""
    graph, compute = decoder.graph, decoder.compute
    query, key = ops.to(graph, query, compute), ops.to(graph, key, compute)
    query = ops.copy(graph, query, query.numel, "query_contiguous")
    key = ops.copy(graph, key, key.numel, "key_contiguous")
    scores = ops.scale(graph, ops.matmul(graph, query, key, numel, "scores"), "scaled")
    del query, key
    if decoder.shape.attention_softcap:
        scores = ops.from_result(graph, ops.scale(graph, scores, "softcap"), "tanh")
        scores = ops.scale(graph, scores, "softcap")
    if mask is not None:
        scores = ops.add(graph, scores, mask, "masked")
    fused = decoder.plan.device == "cuda" and decoder.plan.compute_dtype == "fp16"
    if not fused:  # CUDA's softmax reads fp16 and writes fp32; every other kernel is given fp32
        scores = ops.to(graph, scores, 4, "scores_fp32")
    weights = ops.softmax(graph, scores, itemsize=4)
    del scores
    weights = ops.to(graph, weights, value.itemsize, "attention_weights")
    value = ops.copy(graph, value, value.numel, "value_contiguous")
    out = ops.matmul(graph, weights, value, query_numel(decoder), "attention")
    del weights, value
    return ops.copy(graph, out, out.numel, "contiguous")


def query_numel(decoder: Decoder) -> int:
    return decoder.plan.positions * decoder.shape.heads * decoder.shape.head_dim


def _math(decoder: Decoder, query: Value, key: Value, value: Value, numel: int) -> Value:
    """SDPA's math backend: in fp32 whatever the input, both sides scaled, probabilities kept."""
    graph, compute = decoder.graph, decoder.compute
    query, key, value = (ops.to(graph, x, compute, "sdpa_cast") for x in (query, key, value))
    query, key, value = (ops.to(graph, x, 4, "sdpa_fp32") for x in (query, key, value))
    query, key = ops.scale(graph, query, "scaled_q"), ops.scale(graph, key, "scaled_k")
    scores = ops.matmul(graph, query, key, numel, "scores")
    del query, key
    mask = graph.allocate(decoder.plan.seq_len**2, 4, "mask")
    scores = ops.add_in_place(graph, scores, mask)
    weights = ops.softmax(graph, scores)
    del scores, mask
    out = ops.matmul(graph, weights, value, query_numel(decoder), "attention")
    del weights, value
    out = ops.to(graph, out, compute, "attention")
    return ops.copy(graph, out, out.numel, "contiguous")
