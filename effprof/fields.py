"""What each field of a plan may hold, and how it is spelled on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effprof.errors import UsageError, unknown

CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": ("bf16", "fp16", "amp-bf16", "amp-fp16", "fp32"),
    "state_dtype": ("same", "fp32", "8bit"),
    "master_weights": ("none", "fp32"),
    "rounding": ("nearest", "stochastic"),
    "checkpointing": ("none", "full"),
    "attention": ("sdpa", "eager", "math"),
    "attention_mask": ("none", "full"),
    "loss": ("standard", "chunked"),
    "rows": ("packed", "packed-isolated", "padded"),
    "zero_grad": ("none", "zero"),
    "optimizer_impl": ("fused", "foreach", "loop"),
    "device": ("cuda", "cpu"),
    "parallel": ("none", "ddp", "fsdp"),
}
TARGETS = ("attention", "mlp")
_MOST_GPUS = 16_384
_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "Mapping[str, Any]": (Mapping,),
    "tuple[str, ...]": (tuple,),
    "None": (type(None),),
}
_WORDS = {
    "str": "a text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "tuple": 'a list, such as ["mlp"],',
    "Mapping": "a table",
}


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def check_type(name: str, declared: str, value: Any) -> None:
    """A value from a file may have any type; UsageError where it is not the field's."""
    kinds = tuple(kind for part in declared.split(" | ") for kind in _KINDS[part])
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise UsageError(
            f"{flag(name)} cannot be {value!r}.",
            f"Give {_WORDS[declared.split(' | ')[0].split('[')[0]]} for {name}.",
        )


def check_positive(name: str, value: Any) -> None:
    """Raise UsageError for anything but a positive whole number."""
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise UsageError(
            f"{flag(name)} must be a positive whole number, not {value!r}.",
            f"Type for example {flag(name)} 8.",
        )


def check_choices(values: Mapping[str, Any]) -> None:
    """Raise UsageError where a field has none of its choices, or a count none that is."""
    for name, known in CHOICES.items():
        value = values[name]
        if value not in known and not (name in ("optimizer_impl", "state_dtype") and not value):
            raise unknown(flag(name), str(value), known)
    for name in ("micro_batch", "seq_len", "gpus"):
        check_positive(name, values[name])
    if values["gpus"] > _MOST_GPUS:
        raise UsageError(
            f"--gpus {values['gpus']} is more than the {_MOST_GPUS:,} that are reckoned with.",
            "Type fewer.",
        )
    for name in ("grad_accum", "global_batch", "rank", "tokens"):
        if values[name] is not None:
            check_positive(name, values[name])
    for target in values["targets"] or ("",):
        if target not in TARGETS:
            raise unknown("--targets value", str(target), TARGETS)
