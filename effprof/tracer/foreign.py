"""Models of a type that is not estimated: whatever causal language model transformers has.

Their plan is resolved with a stand-in architecture, sizes alone; the model itself is transformers'
own, its linear layers found as ``effprof.apply`` finds them.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effprof.architectures import admit
from effprof.configuration import supported
from effprof.errors import UsageError
from effprof.fields import TARGETS
from effprof.model import Architecture
from effprof.plan import Plan
from effprof.trainer.apply import edit_model
from effprof.trainer.build import ATTENTION, quiet_transformers
from effprof.trainer.layer import DTYPES, MethodLinear
from effprof.trainer.targets import linear_targets


def admit_config(model: str) -> None:
    """Let a plan name the config.json of a type that only transformers knows.

    Raises UsageError where transformers has no causal language model of that type.
    """
    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # a preset, or an error that the plan words
    kind = config.get("model_type") if isinstance(config, dict) else None
    if isinstance(kind, str) and not supported(kind):
        admit(model, stand_in(config, path.resolve().parent.name))


def stand_in(config: dict[str, Any], name: str) -> Architecture:
    """Sizes of a foreign configuration, by transformers' common names."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config["model_type"]
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UsageError(
            f"transformers has no causal language model of type {kind!r}.",
            "Give the config.json of one that it has.",
        )
    quiet_transformers()
    values = {key: value for key, value in config.items() if key != "model_type"}
    try:
        found = AutoConfig.for_model(kind, **values)
        heads = int(found.num_attention_heads)
        hidden = int(found.hidden_size)
        return Architecture(
            name=name,
            model_type=kind,
            hidden=hidden,
            intermediate=int(getattr(found, "intermediate_size", None) or 4 * hidden),
            layers=int(found.num_hidden_layers),
            heads=heads,
            kv_heads=int(getattr(found, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(found, "head_dim", None) or hidden // heads),
            vocab=int(found.vocab_size),
            tied=bool(getattr(found, "tie_word_embeddings", False)),
            qkv_bias=False,
            o_bias=False,
            mlp_bias=False,
            activation=str(getattr(found, "hidden_act", "gelu")),
            max_positions=int(getattr(found, "max_position_embeddings", None) or 2**20),
            attention_softcap=None,
            logit_softcap=None,
            sliding_window=None,
            config=config,
            foreign=True,
        )
    except UsageError:
        raise
    except Exception as problem:  # noqa: BLE001 - each type checks its fields in its own way
        raise UsageError(
            f"transformers cannot read this {kind} configuration: {problem}.",
            "Correct config.json.",
        ) from None


def arranged_foreign(plan: Plan) -> nn.Module:
    """The model on meta with the method's layers, and what the plan freezes frozen."""
    _refuse(plan)
    model = _skeleton(plan)
    half: Any = plan.halves.layer
    found = linear_targets(model, swapped=half is None and plan.halves.covers_all)
    targeted = {linear.weight for _, linear, _ in found}
    if half is not None:
        dtype = DTYPES[plan.weight_dtype]
        for name, linear, matrix in found:
            parent, _, leaf = name.rpartition(".")
            made = MethodLinear(half, matrix, plan.layer_settings, dtype, linear.bias)
            setattr(model.get_submodule(parent), leaf, made)
        changes = half.edit(plan.layer_settings) if hasattr(half, "edit") else {}
        edit_model(model, changes, {m for m in model.modules() if isinstance(m, MethodLinear)})
    if plan.freeze_rest:
        inside = {p for m in model.modules() if isinstance(m, MethodLinear) for p in m.parameters()}
        for parameter in model.parameters():
            if parameter not in inside and parameter not in targeted:
                parameter.requires_grad_(False)
    return model


def counted(model: nn.Module) -> dict[str, int]:
    """Parameters held, trainable and targeted."""
    layers = [m for m in model.modules() if isinstance(m, MethodLinear)]
    inside = {p for layer in layers for p in layer.parameters()}
    every = list(model.parameters())
    return {
        "total": sum(p.numel() for p in every),
        "trainable": sum(p.numel() for p in every if p.requires_grad),
        "targeted": sum(p.numel() for p in inside),
    }


def _refuse(plan: Plan) -> None:
    """Raise UsageError for what a stand-in cannot answer."""
    kind = plan.architecture.model_type
    for name, refused in (
        ("--targets", plan.targets != TARGETS),
        ("--loss chunked", plan.loss == "chunked"),
    ):
        if refused:
            raise UsageError(
                f"{name} is not available for models of type {kind}, which effprof knows from "
                f"transformers alone.",
                f"Leave {name} out.",
            )


def _skeleton(plan: Plan) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = plan.architecture
    values = {k: v for k, v in shape.config.items() if k not in ("model_type", "dtype")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.for_model(shape.model_type, **{**values, "use_cache": False})
        with torch.device("meta"):
            try:
                model: nn.Module = AutoModelForCausalLM.from_config(
                    config,
                    dtype=DTYPES[plan.weight_dtype],
                    attn_implementation=ATTENTION[plan.attention],
                )
            except ValueError as problem:  # an attention that the type does not have
                raise UsageError(f"{problem}", "Use --attention eager.") from None
    return model
