"""Which linear layers of anyone's model a method takes, what each is, and what the rest is."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from effprof import registry
from effprof.configuration import from_config
from effprof.errors import UsageError
from effprof.model import Architecture, Matrix
from effprof.recipe import Size, preset_of
from effprof.trainer.turns import PAUSED

_KINDS = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "qkv_proj": "qkv",
    "gate_proj": "gate",
    "up_proj": "up",
    "gate_up_proj": "gate_up",
    "down_proj": "down",
}


def linear_targets(
    model: nn.Module, leave: Sequence[str] | None = None, *, swapped: bool = False
) -> list[tuple[str, nn.Linear, Matrix]]:
    """The linear layers a method takes. Raises UsageError where there are none."""
    head = _head(model)
    # Not subclasses: attention reads the weight of its own kind of linear layer.
    linears = [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear]
    linears = [(n, m) for n, m in linears if _may_train(m)]
    if leave is None:
        known = [(n, m) for n, m in linears if n.rpartition(".")[2] in _KINDS]
        gated = any(name.endswith("down_proj") for name, _ in known)
        linears = known if gated else [(n, m) for n, m in linears if m is not head]
    else:
        unknown = set(leave) - {name for name, _ in linears}
        if unknown:
            raise UsageError(
                f"{sorted(unknown)[0]!r} is no linear layer of this model.",
                "Give names as model.named_modules() has them.",
            )
        linears = [(n, m) for n, m in linears if n not in leave]
    if not linears and not swapped:
        raise UsageError(
            "No linear layer (nn.Linear) to train this way was found in the model.",
            "A method takes nn.Linear layers other than the output head.",
        )
    return [(name, linear, _matrix(model, name, linear)) for name, linear in linears]


def _may_train(linear: nn.Linear) -> bool:
    """Whether a layer is not frozen, or only paused by an optimizer of ours."""
    return linear.weight.requires_grad or getattr(linear.weight, PAUSED, False)


def _matrix(model: nn.Module, name: str, linear: nn.Linear) -> Matrix:
    kind = _KINDS.get(name.rpartition(".")[2], "linear")
    config = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", 1) if kind in ("q", "o", "qkv") else 1
    if kind in ("k", "v"):
        heads = getattr(config, "num_key_value_heads", None) or heads
    rows, columns = linear.weight.shape
    full = f"{name}.weight"
    return Matrix(full, rows, columns, kind, _layer_index(full), heads or 1)


def _layer_index(name: str) -> int:
    """The number of the repeated block a name belongs to; -1 for none."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(found[1]) if found else -1


def untargeted_matrix(model: nn.Module, parameter: nn.Parameter, name: str) -> Matrix:
    """An untargeted parameter's matrix and kind."""
    layer = _layer_index(name)
    if parameter.dim() != 2:
        kind = "bias" if name.endswith("bias") else "norm"
        kind = kind if parameter.dim() == 1 else "linear"
        return Matrix(name, parameter.numel(), 1, kind, layer, flat=True)
    head = _head(model)
    rows, columns = parameter.shape
    if any(m.weight is parameter for m in model.modules() if isinstance(m, nn.Embedding)):
        kind = "embedding"
    else:
        kind = "head" if head is not None and head.weight is parameter else "linear"
    return Matrix(name, rows, columns, kind, layer)


def _head(model: nn.Module) -> nn.Linear | None:
    """The output head: what a language model says it is, else the last linear layer."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if head is None:
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
        tied = [linear for linear in linears if linear.weight in tables]
        head = next(reversed(tied or linears), None)
    return head if isinstance(head, nn.Linear) else None


def size_of(model: nn.Module, found: Sequence[tuple[str, nn.Linear, Matrix]]) -> Size:
    """Defaults are the nearest published size's; the rank a quarter of the narrowest layer."""
    shape = _architecture(model)
    sizes = tuple(name for one in registry.names() for name in registry.method(one).facts.defaults)
    preset = preset_of(shape, tuple(dict.fromkeys(sizes))) if shape else None
    total = sum(parameter.numel() for parameter in model.parameters())

    def rank() -> int:
        return max(min((m.shorter for _, _, m in found), default=4) // 4 // 8 * 8, 1)

    return Size(total, preset, rank)


def _architecture(model: nn.Module) -> Architecture | None:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return None
    try:
        return from_config(config.to_dict(), "")
    except UsageError:
        return None
