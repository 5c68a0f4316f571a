"""A mixture-of-experts block over storages: router, top-k, and one grouped product per matrix.

Source: transformers 5.23 modeling_mixtral.py, modeling_qwen3_moe.py and integrations/moe.py
(grouped_mm, the default). Sizes follow from tokens × top-k alone, so routing does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from effprof.estimator import operations as ops
from effprof.estimator.autograd import Graph, Value

if TYPE_CHECKING:
    from effprof.estimator.decoder import Decoder


def mix(decoder: Decoder, x: Value, index: int) -> Value:
    """The block of decoder layer ``index`` on positions × hidden."""
    graph, shape = decoder.graph, decoder.shape
    path = f"model.layers.{index}.mlp."
    positions = decoder.plan.positions
    pairs = positions * shape.active_experts
    scores = _route(decoder, x, decoder.weight(f"{path}gate.weight"))
    graph.module = f"{path}experts."
    expert_ids = graph.allocate(pairs, 8, "sorted_ids")
    order = graph.allocate(pairs, 8, "order")
    rows = graph.allocate(pairs, 8, "rows")
    hidden = _gather(graph, x, rows, pairs * shape.hidden, "selected")
    del rows
    share = _gather(graph, scores, order, pairs, "weights")
    counted = graph.allocate(pairs, 4, "counted_ids")
    offsets = graph.allocate(shape.experts, 4, "offsets")
    del expert_ids, counted, scores
    up, down = (decoder.weight(f"{path}experts.{name}_proj") for name in ("gate_up", "down"))
    both = _grouped(graph, hidden, up, offsets, pairs * 2 * shape.intermediate, "gate_up")
    del hidden
    gate, value = ops.split(graph, both)
    del both
    gated = ops.mul(graph, ops.activation(graph, gate, shape.activation), value, "gated")
    del gate, value
    out = _grouped(graph, gated, down, offsets, pairs * shape.hidden, "down")
    del gated, offsets
    weighted = ops.mul(graph, out, share, "weighted")
    del out, share
    inverse = graph.allocate(pairs, 8, "inverse_order")
    del order
    weighted = _gather(graph, weighted, inverse, pairs * shape.hidden, "restored")
    del inverse
    summed = _summed(graph, weighted, positions * shape.hidden)
    return ops.to(graph, summed, x.itemsize, "mixed")


def _route(decoder: Decoder, x: Value, weight: Value) -> Value:
    """Each position's top-k probabilities, in fp32 for mixtral."""
    graph, shape = decoder.graph, decoder.shape
    positions = decoder.plan.positions
    chosen = positions * shape.active_experts
    graph.module = graph.module.removesuffix("experts.") + "gate."
    logits = decoder.linear(x, weight, shape.experts)
    itemsize = logits.itemsize
    probabilities = ops.softmax(graph, ops.to(graph, logits, 4, "logits_fp32"))
    values = _top(graph, probabilities, chosen)
    del probabilities
    if shape.model_type == "mixtral" or shape.config.get("norm_topk_prob", False):
        values = _normalised(graph, values, positions)
    if shape.model_type != "mixtral":
        values = ops.to(graph, values, itemsize, "scores")
    return values


def _top(graph: Graph, x: Value, chosen: int) -> Value:
    """topk: values, and the indices that backward scatters by."""
    numel = x.numel

    def rule(graph: Graph, gradient: Value, saved: list[Value]) -> Sequence[Value]:
        return (graph.allocate(numel, gradient.itemsize, "d_topk"),)

    out = graph.allocate(chosen, x.itemsize, "topk_values")
    indices = graph.allocate(chosen, 8, "topk_indices")
    return graph.attach(out, "topk", (x,), (indices,), rule)


def _normalised(graph: Graph, values: Value, positions: int) -> Value:
    """values /= their sum, in place: what they were is kept, and so is the sum."""
    numel, itemsize = values.numel, values.itemsize

    def rule(graph: Graph, gradient: Value, saved: list[Value]) -> Sequence[Value]:
        return (graph.allocate(numel, itemsize, "d_values"),)

    total = graph.allocate(positions, itemsize, "topk_sum")
    before = graph.allocate(numel, itemsize, "topk_before")
    out = Value(values.storage, numel, itemsize)
    return graph.attach(out, "div_", (values,), (before, total), rule)


def _gather(graph: Graph, x: Value, indices: Value, numel: int, label: str) -> Value:
    """x[indices] by rows: backward adds into zeros of x's size."""
    source = x.numel

    def rule(graph: Graph, gradient: Value, saved: list[Value]) -> Sequence[Value]:
        return (graph.allocate(source, gradient.itemsize, "d_index"),)

    return ops.late(graph, numel, x.itemsize, label, (x,), (indices,), rule)


def _grouped(
    graph: Graph, x: Value, weight: Value, offsets: Value, numel: int, label: str
) -> Value:
    """grouped_mm: each row by its expert's matrix; not autocast, so in the weights' dtype."""
    x = ops.to(graph, x, weight.itemsize, "input_cast")
    x_needs, w_needs, sizes = x.needs_grad, weight.needs_grad, (x.numel, weight.numel)

    def rule(graph: Graph, gradient: Value, saved: list[Value]) -> Sequence[Value | None]:
        d_x = graph.allocate(sizes[0], gradient.itemsize, "d_input") if x_needs else None
        d_w = graph.allocate(sizes[1], gradient.itemsize, "d_experts") if w_needs else None
        return d_x, d_w

    saved = [one for one, wanted in ((x, w_needs), (weight, x_needs)) if wanted]
    out = graph.allocate(numel, weight.itemsize, label)
    return graph.attach(out, label, (x, weight), (*saved, offsets), rule)


def _summed(graph: Graph, x: Value, numel: int) -> Value:
    """The sum over each position's experts: backward is a view."""
    source = x.numel

    def rule(graph: Graph, gradient: Value, saved: list[Value]) -> Sequence[Value]:
        return (Value(gradient.storage, source, gradient.itemsize),)

    return graph.attach(graph.allocate(numel, x.itemsize, "sum"), "sum", (x,), (), rule)
