"""Architecture of a causal language model, from a preset or a Hugging Face config.json.

No transformers.

Layer shapes follow transformers 5.23's own modules, type by type, so parameter counts are exact.
"""

from __future__ import annotations

import functools
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effprof.errors import UsageError, unknown

PRESETS = Path(__file__).parent / "presets"

ATTENTION_KINDS = ("q", "k", "v", "o", "qkv")
MLP_KINDS = ("gate", "up", "gate_up", "down")

# What transformers 5.23 assumes for a key that config.json leaves out.
_COMMON: dict[str, Any] = {
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "head_dim": None,
    "num_key_value_heads": None,
}
_TYPES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "use_sliding_window": False},
    "qwen3": {
        "num_key_value_heads": 32,
        "head_dim": 128,
        "attention_bias": False,
        "use_sliding_window": False,
    },
    "gemma": {
        "num_key_value_heads": 16,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "gemma2": {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "phi3": {"max_position_embeddings": 4096},
    "mixtral": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "attention_bias": False,
        "use_sliding_window": False,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
    },
}
_EXPERTS = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts"}
_WITH_ATTENTION_BIAS = (
    "llama",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
)  # on q, k, v and o, where it is set
_WHOLE_HEADS = ("llama", "gemma2")
_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)


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


@functools.cache
def presets() -> dict[str, dict[str, Any]]:
    """Every preset by name and alias."""
    with open(PRESETS / "models.toml", "rb") as file:
        table: dict[str, dict[str, Any]] = tomllib.load(file)
    named = {}
    for name, config in table.items():
        aliases = config.pop("aliases")
        config["name"] = name
        named.update(dict.fromkeys((name, *aliases), config))
    return named


_ADMITTED: dict[str, Architecture] = {}


def supported(model_type: str) -> bool:
    """Whether a type is written out here, layer by layer."""
    return model_type in _TYPES


def admit(model: str, shape: Architecture) -> None:
    """Let a model's name stand for this architecture."""
    _ADMITTED[model] = shape


def architecture(model: str) -> Architecture:
    """The architecture of a preset name or of a path to a config.json (or its folder).

    Raises UsageError for an unknown name, an unreadable file, an unsupported type or a bad field.
    """
    return _ADMITTED.get(model) or _architecture(model)


@functools.cache
def _architecture(model: str) -> Architecture:
    path = Path(model)
    preset = presets().get(model.lower().replace("_", "-"))
    if preset is None and (model.endswith(".json") or path.is_dir()):
        file = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(file.read_text(encoding="utf-8-sig"))
        except OSError as problem:
            raise UsageError(
                f"Cannot read {str(file)!r}: {problem.strerror}.",
                "Give a preset name or the path of a Hugging Face config.json.",
            ) from None
        except ValueError as problem:
            raise UsageError(
                f"{str(file)!r} is not valid JSON: {problem}.", "Download config.json again."
            ) from None
        usual = file.name == "config.json"
        return from_config(config, name=file.parent.resolve().name if usual else file.stem)
    if preset is None:
        if "/" in model:
            raise UsageError(
                f"There is no file {model!r}.",
                "A model of the Hub is given by its config.json: save it, and type its path.",
            )
        raise unknown("model", model, presets(), "A path to a config.json works too.")
    config = {key: value for key, value in preset.items() if key != "name"}
    return from_config(config, preset["name"])


def from_config(config: Any, name: str) -> Architecture:
    """An architecture from the keys of a Hugging Face config.json. Raises UsageError."""
    if not isinstance(config, dict):
        raise UsageError(
            f"The configuration of {name!r} is not a JSON object.", "Give a config.json."
        )
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _TYPES:
        raise UsageError(
            f"Model type {model_type!r} in {name!r} is not supported.",
            f"Supported model_type values: {', '.join(_TYPES)}. `effprof trace` takes any causal "
            f"language model of transformers.",
        )
    # A size whose default is a number may be absent, but transformers refuses it null.
    sized = {"max_position_embeddings"} | (
        {"num_key_value_heads", "head_dim"} & _TYPES[model_type].keys()
    )
    missing = [key for key in _REQUIRED if config.get(key) is None]
    missing += [key for key in sorted(sized) if key in config and config[key] is None]
    if missing:
        raise UsageError(
            f"The configuration of {name!r} lacks {', '.join(missing)}.",
            "Add the field to config.json; transformers' own defaults are another model.",
        )
    full = {**_COMMON, **_TYPES[model_type], **_with_experts_name(config, model_type, name)}
    _check_kinds(full, name)
    sizes = {key: full[key] for key in _REQUIRED}
    sizes["num_key_value_heads"] = full["num_key_value_heads"] or full["num_attention_heads"]
    sizes["head_dim"] = _head_dim(full, name) if full["head_dim"] is None else full["head_dim"]
    sizes["max_position_embeddings"] = full["max_position_embeddings"]
    experts = _EXPERTS.get(model_type)
    if experts is not None:
        for key in (experts, "num_experts_per_tok"):
            sizes[key] = full[key]
        if "moe_intermediate_size" in full:
            sizes["intermediate_size"] = full["moe_intermediate_size"]
    for key, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise UsageError(
                f"{key} is {value!r} in {name!r}.", f"{key} must be a positive whole number."
            )
    if model_type in _WHOLE_HEADS and sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise UsageError(
            f"hidden_size {sizes['hidden_size']} is not a multiple of num_attention_heads "
            f"{sizes['num_attention_heads']} in {name!r}.",
            f"transformers refuses that of a {model_type}, whatever its head_dim.",
        )
    if sizes["head_dim"] % 2:
        raise UsageError(
            f"head_dim {sizes['head_dim']} is odd in {name!r}.",
            "Rotary embeddings need an even one.",
        )
    if sizes["num_attention_heads"] % sizes["num_key_value_heads"]:
        raise UsageError(
            f"num_attention_heads {sizes['num_attention_heads']} is not a multiple of "
            f"num_key_value_heads {sizes['num_key_value_heads']} in {name!r}.",
            "Correct num_key_value_heads in config.json.",
        )
    if experts is not None:
        _check_experts(full, sizes[experts], name)
    bias = bool(full.get("attention_bias")) and model_type in _WITH_ATTENTION_BIAS
    # gemma2 reads hidden_activation, the others hidden_act; both gemmas are tanh-gelu unless told.
    act = full.get("hidden_activation") or full["hidden_act"]
    sliding = full.get("sliding_window") if full.get("use_sliding_window", True) else None
    return Architecture(
        name=name,
        model_type=model_type,
        hidden=sizes["hidden_size"],
        intermediate=sizes["intermediate_size"],
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        kv_heads=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"],
        vocab=sizes["vocab_size"],
        tied=bool(full["tie_word_embeddings"]),
        qkv_bias=bias or model_type == "qwen2",
        o_bias=bias,
        mlp_bias=bool(full.get("mlp_bias")) and model_type == "llama",
        activation="gelu_pytorch_tanh" if model_type == "gemma2" and act == "silu" else str(act),
        max_positions=sizes["max_position_embeddings"],
        attention_softcap=full["attn_logit_softcapping"] if model_type == "gemma2" else None,
        logit_softcap=full["final_logit_softcapping"] if model_type == "gemma2" else None,
        sliding_window=sliding,
        config=config,
        experts=sizes[experts] if experts else 0,
        active_experts=sizes["num_experts_per_tok"] if experts else 0,
    )


def _with_experts_name(config: dict[str, Any], model_type: str, name: str) -> dict[str, Any]:
    """Both names of the number of experts count, as in transformers. Raises UsageError."""
    own, known = _EXPERTS.get(model_type), [key for key in _EXPERTS.values() if key in config]
    if own is None or not known:
        return config
    if len({config[key] for key in known}) > 1:
        raise UsageError(f"{' and '.join(known)} differ in {name!r}.", "Correct config.json.")
    return {**config, own: config[known[0]]}


def _check_experts(config: Mapping[str, Any], experts: int, name: str) -> None:
    """Every layer must have the same experts, of which a token meets some."""
    if config["num_experts_per_tok"] > experts:
        raise UsageError(
            f"num_experts_per_tok {config['num_experts_per_tok']} exceeds the {experts} experts in "
            f"{name!r}.",
            "Correct config.json.",
        )
    if experts < 2 or config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise UsageError(
            f"{name!r} has layers without experts, or a single one.",
            "Supported: decoder_sparse_step 1, no mlp_only_layers, two experts or more.",
        )


_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


def _check_kinds(config: Mapping[str, Any], name: str) -> None:
    """Fields that decide shapes or kernels must be of the kind transformers reads them as."""
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"):
        if not isinstance(config.get(key, False), bool):
            raise UsageError(f"{key} is {config[key]!r} in {name!r}.", f"{key} is true or false.")
    for key in ("hidden_act", "hidden_activation"):
        if config.get(key) is not None and config[key] not in _ACTIVATIONS:
            raise UsageError(
                f"{key} is {config[key]!r} in {name!r}.", f"Known: {', '.join(_ACTIVATIONS)}."
            )
    for key in ("rms_norm_eps", "rope_theta"):
        value = config.get(key)
        if value is not None and (not _is_number(value) or value <= 0):
            raise UsageError(f"{key} is {value!r} in {name!r}.", f"{key} is a positive number.")
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key), Mapping | None):
            raise UsageError(f"{key} is {config[key]!r} in {name!r}.", f"{key} is a table or null.")
    window = config.get("sliding_window")
    if window is not None and (not isinstance(window, int) or window <= 0):
        raise UsageError(
            f"sliding_window is {window!r} in {name!r}.", "It is a positive whole number or null."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _head_dim(config: Mapping[str, Any], name: str) -> int:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if not (isinstance(hidden, int) and isinstance(heads, int) and heads > 0) or hidden % heads:
        raise UsageError(
            f"hidden_size {hidden!r} is not a multiple of num_attention_heads {heads!r} in "
            f"{name!r}.",
            "Correct config.json or give head_dim.",
        )
    return hidden // heads


def nearest_size(sizes: tuple[str, ...], parameters: int) -> str:
    """The preset size whose parameter count is nearest by ratio."""

    def distance(size: str) -> float:
        ratio = architecture(size).parameters / parameters
        return max(ratio, 1 / ratio)

    return min(sizes, key=distance)
