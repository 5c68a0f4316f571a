"""Architecture of a causal language model: the shapes a step is made of.

Layer shapes follow transformers 5.23's own modules, type by type, so parameter counts are exact.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ATTENTION_KINDS = ("q", "k", "v", "o", "qkv")
MLP_KINDS = ("gate", "up", "gate_up", "down")


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight matrix of a linear layer: ``rows`` outputs × ``columns`` inputs.

    ``reads`` names the activation it multiplies: q, k and v read the same one, which is kept once.
    ``count`` matrices of experts are one tensor, of which a token meets ``active``.
    """

    name: str
    rows: int
    columns: int
    kind: str
    layer: int = -1
    heads: int = 1
    count: int = 1
    reads: str = ""
    bias: bool = False
    flat: bool = False
    active: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape; a flat one is a vector of ``rows`` numbers, experts are stacked."""
        if self.count > 1:
            return (self.count, self.rows, self.columns)
        return (self.rows,) if self.flat else (self.rows, self.columns)

    @property
    def multiplied(self) -> int:
        """Numbers that one token is multiplied by."""
        return self.rows * self.columns * self.active

    @property
    def numel(self) -> int:
        return self.rows * self.columns * self.count

    @property
    def block(self) -> str:
        """Which of ``--targets`` it belongs to: attention, mlp, or neither."""
        if self.kind in ATTENTION_KINDS:
            return "attention"
        return "mlp" if self.kind in MLP_KINDS else ""

    @property
    def shorter(self) -> int:
        return min(self.rows, self.columns)

    @property
    def longer(self) -> int:
        return max(self.rows, self.columns)


@dataclass(frozen=True)
class Architecture:
    """The shapes a step is made of. ``config`` is the Hugging Face configuration it came from."""

    name: str
    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    activation: str
    max_positions: int
    attention_softcap: float | None
    logit_softcap: float | None
    sliding_window: int | None
    config: Mapping[str, Any] = field(compare=False, hash=False)
    experts: int = 0
    active_experts: int = 0
    foreign: bool = False  # of a type that is traced and not estimated: sizes alone are true

    @property
    def fused(self) -> bool:
        """Whether q, k, v and gate, up are one matrix each (phi3)."""
        return self.model_type == "phi3"

    @property
    def gemma(self) -> bool:
        """Whether norms scale by 1 + weight in fp32 and embeddings by sqrt(hidden)."""
        return self.model_type.startswith("gemma")

    @property
    def eager(self) -> bool:
        """Whether transformers has only its own attention for it (gemma2)."""
        return self.model_type == "gemma2"

    @property
    def head_norms(self) -> bool:
        """Whether queries and keys are normalised per head (qwen3 and its experts)."""
        return self.model_type.startswith("qwen3")

    @property
    def norms_per_layer(self) -> int:
        """Norms over the hidden width in one layer: gemma2 also normalises what a block returns."""
        return 4 if self.model_type == "gemma2" else 2

    def layer_matrices(self, layer: int = 0) -> tuple[Matrix, ...]:
        """The linear layers of one decoder layer, in the order they run."""
        h, f = self.hidden, self.intermediate
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        path = f"model.layers.{layer}"

        def matrix(
            module: str, rows: int, columns: int, kind: str, reads: str, bias: bool
        ) -> Matrix:
            heads = (
                self.heads if kind in ("q", "o", "qkv") else self.kv_heads if kind in "kv" else 1
            )
            name = f"{path}.{module}_proj.weight"
            return Matrix(name, rows, columns, kind, layer, heads, 1, reads, bias)

        if self.fused:
            return (
                matrix("self_attn.qkv", q + 2 * kv, h, "qkv", "attention_input", False),
                matrix("self_attn.o", h, q, "o", "attention_output", False),
                matrix("mlp.gate_up", 2 * f, h, "gate_up", "mlp_input", False),
                matrix("mlp.down", h, f, "down", "mlp_hidden", False),
            )
        attention = (
            matrix("self_attn.q", q, h, "q", "attention_input", self.qkv_bias),
            matrix("self_attn.k", kv, h, "k", "attention_input", self.qkv_bias),
            matrix("self_attn.v", kv, h, "v", "attention_input", self.qkv_bias),
            matrix("self_attn.o", h, q, "o", "attention_output", self.o_bias),
        )
        if self.experts:
            return attention
        return (
            *attention,
            matrix("mlp.gate", f, h, "gate", "mlp_input", self.mlp_bias),
            matrix("mlp.up", f, h, "up", "mlp_input", self.mlp_bias),
            matrix("mlp.down", h, f, "down", "mlp_hidden", self.mlp_bias),
        )

    def expert_matrices(self, layer: int = 0) -> tuple[Matrix, ...]:
        """The router and the stacked experts of one layer; none where its MLP is dense."""
        if not self.experts:
            return ()
        h, f, path = self.hidden, self.intermediate, f"model.layers.{layer}.mlp"
        router = Matrix(f"{path}.gate.weight", self.experts, h, "router", layer, reads="mlp_input")
        stacked = {"kind": "expert", "count": self.experts, "active": self.active_experts}
        up = Matrix(f"{path}.experts.gate_up_proj", 2 * f, h, reads="mlp_input", **stacked)  # type: ignore[arg-type]
        down = Matrix(f"{path}.experts.down_proj", h, f, reads="mlp_hidden", **stacked)  # type: ignore[arg-type]
        return router, up, down

    @property
    def embedding(self) -> Matrix:
        return Matrix("model.embed_tokens.weight", self.vocab, self.hidden, "embedding")

    @property
    def head(self) -> Matrix | None:
        """The output head, or None where it is tied to the embedding."""
        if self.tied:
            return None
        return Matrix("lm_head.weight", self.vocab, self.hidden, "head", reads="head_input")

    def layer_vectors(self, layer: int = 0) -> tuple[tuple[str, int, str], ...]:
        """The one-dimensional parameters of one layer: (name, length, kind norm | bias)."""
        path = f"model.layers.{layer}"
        norms = ["input_layernorm", "post_attention_layernorm"]
        if self.norms_per_layer == 4:
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        vectors = [(f"{path}.{name}.weight", self.hidden, "norm") for name in norms]
        if self.head_norms:
            vectors += [
                (f"{path}.self_attn.{part}_norm.weight", self.head_dim, "norm") for part in "qk"
            ]
        vectors += [
            (f"{matrix.name.removesuffix('weight')}bias", matrix.rows, "bias")
            for matrix in self.layer_matrices(layer)
            if matrix.bias
        ]
        return tuple(vectors)

    @functools.cached_property
    def parameters(self) -> int:
        """The number of parameters, equal to transformers' own count."""
        matrices = (*self.layer_matrices(), *self.expert_matrices())
        layer = sum(m.numel for m in matrices) + sum(n for _, n, _ in self.layer_vectors())
        ends = self.embedding.numel + (self.head.numel if self.head else 0) + self.hidden
        return self.layers * layer + ends
