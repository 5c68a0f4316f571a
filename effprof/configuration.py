"""An architecture from a Hugging Face config.json, without transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effprof.errors import UsageError
from effprof.model import Architecture

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


def supported(model_type: str) -> bool:
    """Whether a type is written out here, layer by layer."""
    return model_type in _TYPES


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
    sizes = _sizes(full, model_type, name)
    experts = _EXPERTS.get(model_type)
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


def _sizes(full: Mapping[str, Any], model_type: str, name: str) -> dict[str, int]:
    """The counts among a configuration's fields. Raises UsageError for one that cannot be."""
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
    return sizes


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
