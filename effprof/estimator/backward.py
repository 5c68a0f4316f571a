"""FLOPs of a backward pass: a gradient is formed only where something before it is trained."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Sequence

from effprof.step import Step, Unit

Trains = Callable[[str, Unit], bool]


def backward_flops(step: Step, tokens: int, attention_layer: int) -> float:
    """Products of one micro-batch's backward; the mean over a cycle where blocks take turns.

    ``attention_layer`` is the forward's scores and weighted values of one layer.
    """
    if not step.turns:
        return _one(step, tokens, attention_layer, lambda name, unit: bool(unit.trained))
    totals = [_one(step, tokens, attention_layer, _among(turn)) for turn in step.turns]
    return sum(totals) / len(totals)


def _among(names: Container[str]) -> Trains:
    return lambda name, unit: name in names


def _one(step: Step, tokens: int, attention_layer: int, trains: Trains) -> int:
    plan, shape = step.plan, step.architecture
    units = dict(step.placed)
    embedding, norm = "model.embed_tokens.weight", "model.norm.weight"
    # Under checkpointing transformers makes the first layer's input require a gradient.
    below = trains(embedding, units[embedding]) or plan.checkpointing == "full"
    total, length = 0, len(step.layer)
    first = 1  # the embedding
    seen: dict[tuple[bool, tuple[bool, ...]], tuple[int, bool]] = {}
    for index in range(shape.layers):
        placed = step.placed[first + index * length : first + (index + 1) * length]
        flags = tuple(trains(name, unit) for name, unit in placed)
        key = (below, flags)
        if key not in seen:
            seen[key] = _layer([unit for _, unit in placed], flags, tokens, attention_layer, below)
        products, below = seen[key]
        total += products
    below = below or trains(norm, units[norm])
    name = embedding if shape.tied else "lm_head.weight"
    head = 2 * tokens * shape.vocab * shape.hidden
    return total + head * (below + trains(name, units[name]))


def _layer(
    units: Sequence[Unit], flags: Sequence[bool], tokens: int, attention: int, below: bool
) -> tuple[int, bool]:
    """One decoder layer's products, and whether what follows it must have a gradient."""
    trained = dict(zip((_short(unit) for unit in units), flags, strict=True))
    total = 0

    def block(reads: str, needed: bool) -> bool:
        """The matrices that read one activation; whether what they give needs a gradient."""
        nonlocal total
        after = needed
        for unit in units:
            if unit.matrix.reads != reads:
                continue
            own = trained[_short(unit)]
            total += _products(unit, tokens, trained=own, needed=needed)
            bias = _short(unit).removesuffix("weight") + "bias"
            after = after or own or trained.get(bias, False)
        return after

    def any_of(*names: str) -> bool:
        return any(trained.get(f"{name}.weight", False) for name in names)

    heads = block("attention_input", below or any_of("input_layernorm"))
    heads = heads or any_of("self_attn.q_norm", "self_attn.k_norm")
    total += 2 * attention * heads
    hidden = block("attention_output", heads) or below
    after_attention, before_mlp = "post_attention_layernorm", "pre_feedforward_layernorm"
    hidden = hidden or any_of(after_attention)
    gated = block("mlp_input", hidden or any_of(before_mlp))
    out = block("mlp_hidden", gated)
    return total, hidden or out or any_of("post_feedforward_layernorm")


@functools.cache
def _name(name: str) -> str:
    return name.split(".layers.")[1].partition(".")[2]


def _short(unit: Unit) -> str:
    """A parameter's name inside its layer."""
    return _name(unit.matrix.name)


def _products(unit: Unit, tokens: int, *, trained: bool, needed: bool) -> int:
    """One product for the input's gradient, one for the weight's; a layer half forms all it has."""
    if unit.layer_half:
        return unit.backward if trained or needed else 0
    return 2 * tokens * unit.matrix.multiplied * (trained + needed)
