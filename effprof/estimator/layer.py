"""One layer of a transformers decoder over storages, as its module's forward is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from effprof.estimator import operations as ops
from effprof.estimator.attention import attend
from effprof.estimator.autograd import Graph, Value
from effprof.estimator.experts import mix

if TYPE_CHECKING:
    from effprof.estimator.decoder import Decoder


class Layer:
    """One decoder layer's forward."""

    def __init__(
        self,
        decoder: Decoder,
        index: int,
        cos: Value,
        sin: Value,
        mask: Value | None,
        positions: Value,
    ) -> None:
        self.decoder = decoder
        self.graph = decoder.graph
        self.shape = decoder.shape
        self.index = index
        self.cos, self.sin, self.mask = cos, sin, mask
        self.positions = positions  # an argument: a checkpoint keeps it
        self.path = f"model.layers.{index}."
        self.matrices = {m.kind: m for m in decoder.shape.layer_matrices()}

    def forward(self, x: Value) -> Value:
        graph, sandwich = self.graph, self.shape.norms_per_layer == 4
        residual = x
        x = self._norm(x, "input_layernorm")
        graph.module = f"{self.path}self_attn."
        x = self._attention(x)
        if sandwich:
            x = self._norm(x, "post_attention_layernorm")
        graph.module = self.path
        x = ops.add(graph, residual, x, "residual")
        residual = x
        x = self._norm(x, "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm")
        graph.module = f"{self.path}mlp."
        x = self._mlp(x)
        if sandwich:
            x = self._norm(x, "post_feedforward_layernorm")
        graph.module = self.path
        return ops.add(graph, residual, x, "residual")

    def _norm(self, x: Value, name: str) -> Value:
        self.graph.module = f"{self.path}{name}."
        return self.decoder.norm(x, f"{self.path}{name}.weight")

    def _project(self, x: Value, kind: str) -> Value:
        return self.decoder.project(x, self.matrices[kind], self.index)

    def _attention(self, x: Value) -> Value:
        if self.shape.fused:
            fused = self._project(x, "qkv")
            query, key, value = self._split_heads(fused)
            query, key = (ops.heads(self.graph, part) for part in (query, key))
            del fused
        else:
            query = ops.heads(self.graph, self._project(x, "q"))
            key = ops.heads(self.graph, self._project(x, "k"))
            if self.shape.head_norms:
                query = self.decoder.norm(
                    query, f"{self.path}self_attn.q_norm.weight", self.shape.head_dim
                )
                key = self.decoder.norm(
                    key, f"{self.path}self_attn.k_norm.weight", self.shape.head_dim
                )
            value = self._project(x, "v")
        plan, shape = self.decoder.plan, self.shape
        if plan.attention != "sdpa" or (self.mask is not None and shape.heads > shape.kv_heads):
            value = ops.heads(self.graph, value)  # a fused kernel's gradient lies by rows
        query, key = self._rotate(query, key)
        # The module's locals keep query, key and value to its return.
        out = attend(self.decoder, query, key, value, self.mask)
        return self._project(out, "o")

    def _split_heads(self, fused: Value) -> tuple[Value, Value, Value]:
        """phi3's q, k, v are slices of one product.

        Each slice's backward fills a zero tensor of all of it.
        """
        graph, shape = self.graph, self.shape
        unit = fused.numel // (shape.heads + 2 * shape.kv_heads)
        whole, size = fused.numel, fused.itemsize

        def rule(graph: Graph, gradient: Value, saved: list[Value]) -> Sequence[Value]:
            return (graph.allocate(whole, size, "d_slice"),)

        def part(heads: int) -> Value:
            view = Value(fused.storage, unit * heads, size)
            return graph.attach(view, "slice", (fused,), (), rule)

        return part(shape.heads), part(shape.kv_heads), part(shape.kv_heads)

    def _rotate(self, query: Value, key: Value) -> tuple[Value, Value]:
        return self._rotated(query), self._rotated(key)

    def _rotated(self, x: Value) -> Value:
        """x cos + rotate_half(x) sin; what sin multiplies is saved by no one."""
        graph = self.graph
        straight = ops.mul(graph, x, self.cos, "cos")
        crossed = ops.mul(graph, self._rotate_half(x), self.sin, "sin")
        del x
        rotated = ops.add(graph, straight, crossed, "rotated")
        del straight, crossed
        # phi3 rejoins the rotated part with the rest of each head (partial rotary): one more copy.
        return ops.copy(graph, rotated, rotated.numel, "cat") if self.shape.fused else rotated

    def _rotate_half(self, x: Value) -> Value:
        first, second = ops.half(self.graph, x), ops.half(self.graph, x)
        return ops.concatenate(self.graph, ops.scale(self.graph, second, "neg"), first)

    def _activated(self, gate: Value) -> Value:
        kind = self.shape.activation
        return gate if kind == "linear" else ops.activation(self.graph, gate, kind)

    def _mlp(self, x: Value) -> Value:
        graph = self.graph
        if self.shape.experts:
            return mix(self.decoder, x, self.index)
        if self.shape.fused:
            both = self._project(x, "gate_up")
            gate, up = ops.split(graph, both)
            hidden = ops.mul(graph, up, self._activated(gate), "gated")
            del both, gate, up
        else:
            gate = self._activated(self._project(x, "gate"))
            hidden = ops.mul(graph, gate, self._project(x, "up"), "gated")
            del gate
        return self._project(hidden, "down")
