"""Plan: what the user asks for, resolved and checked.

Every common flag is a field of the same name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from effprof import registry
from effprof.errors import UsageError, unknown
from effprof.model import Architecture, architecture
from effprof.registry import Facts, LayerHalf, Method, UpdateHalf

CHOICES: dict[str, tuple[str, ...]] = {
    "dtype": ("bf16", "amp-bf16", "amp-fp16", "fp32"),
    "state_dtype": ("same", "fp32", "8bit"),
    "master_weights": ("none", "fp32"),
    "checkpointing": ("none", "full"),
    "attention": ("sdpa", "eager", "math"),
    "attention_mask": ("none", "full"),
    "loss": ("standard", "chunked"),
    "rows": ("packed", "packed-isolated", "padded"),
    "zero_grad": ("none", "zero"),
    "optimizer_impl": ("fused", "foreach", "loop"),
    "allocator": ("default", "expandable"),
    "device": ("cuda", "cpu"),
    "parallel": ("none", "ddp", "fsdp"),
}
TARGETS = ("attention", "mlp")

# What the flag promises and this version does not do. Refused: a flag is never silently ignored.
_NOT_YET: dict[str, tuple[tuple[Any, ...], str]] = {
    "state_dtype": (("8bit",), "Use --state-dtype same or fp32."),
    "master_weights": (("fp32",), "Use --dtype amp-bf16, which keeps fp32 weights."),
    "loss": (("chunked",), "Use --loss standard."),
    "per_layer_update": ((True,), "Leave --per-layer-update out."),
    "parallel": (("ddp", "fsdp"), "Use one GPU."),
}


@dataclass(frozen=True)
class Plan:
    """One training configuration.

    Fields left None are resolved; a value without effect raises UsageError.

    Sizes are counts: ``micro_batch`` rows of ``seq_len`` positions, ``grad_accum`` micro-steps per
    update, ``global_batch`` = micro_batch × grad_accum × gpus rows, ``tokens`` positions of the
    whole run.
    """

    model: str
    method: str = ""
    update: str = ""
    rank: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    update_settings: Mapping[str, Any] = field(default_factory=dict)
    micro_batch: int = 16
    seq_len: int = 256
    grad_accum: int = None  # type: ignore[assignment] # resolved, as global_batch is
    global_batch: int = None  # type: ignore[assignment]
    dtype: str = "bf16"
    state_dtype: str = "same"
    master_weights: str = "none"
    checkpointing: str = "none"
    attention: str = "sdpa"
    attention_mask: str = "none"
    loss: str = "standard"
    rows: str = "packed"
    per_layer_update: bool = False
    zero_grad: str = "none"
    optimizer_impl: str = ""
    keep_logits: bool = False
    targets: tuple[str, ...] = TARGETS
    freeze_rest: bool = False
    compile: bool = False
    allocator: str = "default"
    device: str = "cuda"
    gpu: str | None = None
    gpus: int = 1
    parallel: str = "none"
    tokens: int | None = None

    def __post_init__(self) -> None:
        self._check_values()
        self._resolve_batch()
        self._resolve_method()
        self._check_combinations()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_values(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is not None or item.default is not None:
                _check_type(item.name, str(item.type), value)
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known and not (name == "optimizer_impl" and not value):
                raise unknown(flag(name), str(value), known)
        for name in ("micro_batch", "seq_len", "gpus"):
            _positive(name, getattr(self, name))
        for name in ("grad_accum", "global_batch", "rank", "tokens"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        for target in self.targets or ("",):
            if target not in TARGETS:
                raise unknown("--targets value", str(target), TARGETS)
        self._set("targets", tuple(target for target in TARGETS if target in self.targets))
        for name, (refused, hint) in _NOT_YET.items():
            value = getattr(self, name)
            if value in refused:
                shown = flag(name) if value is True else f"{flag(name)} {value}"
                raise UsageError(f"{shown} is not available in this version.", hint)
        if self.gpus != 1:
            raise UsageError(
                f"--gpus {self.gpus} is not available in this version.", "Use --gpus 1."
            )

    def _resolve_batch(self) -> None:
        per_step = self.micro_batch * self.gpus
        accumulation = self.grad_accum
        if accumulation is None:
            accumulation, rest = divmod(self.global_batch or per_step, per_step)
            if rest or not accumulation:
                raise UsageError(
                    f"--global-batch {self.global_batch} is not a multiple of micro-batch × gpus "
                    f"= {per_step}.",
                    f"Type --global-batch {max(accumulation, 1) * per_step}.",
                )
            self._set("grad_accum", accumulation)
        total = per_step * accumulation
        if self.global_batch and self.global_batch != total:
            raise UsageError(
                f"--global-batch {self.global_batch} disagrees with micro-batch "
                f"{self.micro_batch} × "
                f"grad-accum {self.grad_accum} × gpus {self.gpus} = {total}.",
                "Leave one of them out.",
            )
        self._set("global_batch", total)

    def _resolve_method(self) -> None:
        name = self.method or registry.default()
        chosen = registry.method(name, self.update or None)
        if self.update and chosen.layer is None and chosen.update_name != chosen.name:
            raise UsageError(
                f"--update {self.update} has no effect: {chosen.name} has no layer half.",
                f"Use --method {chosen.update_name}.",
            )
        self._set("method", chosen.name)
        self._set("update", chosen.update_name)
        given, given_update = dict(self.settings), dict(self.update_settings)
        fields = registry.setting_fields(chosen.addressed)
        if self.rank is not None:
            if "rank" not in fields:
                raise UsageError(
                    f"--rank has no effect: {chosen.name} has no rank.", "Leave --rank out."
                )
            if str(given.get("rank", self.rank)) != str(self.rank):
                raise UsageError(
                    f"--rank {self.rank} disagrees with --set rank={given['rank']}.",
                    "Give one of them.",
                )
            given["rank"] = self.rank
        if chosen.layer is None:  # both names address the update half
            for key in given.keys() & given_update.keys():
                if given[key] != given_update[key]:
                    raise UsageError(
                        f"--set {key} and --set update.{key} disagree.", "Give one of them."
                    )
            given = given_update = {**given, **given_update}
        addressed = self._build(chosen.addressed, given)
        update = addressed if chosen.layer is None else self._build(chosen.update, given_update)
        self._set("_addressed", addressed)
        self._set("_update", update)
        self._set("settings", dataclasses.asdict(addressed))
        self._set("update_settings", dataclasses.asdict(update))
        self._set("rank", self.settings.get("rank"))
        # What an update half does not cover is torch's AdamW, which has every implementation.
        known = getattr(chosen.update, "IMPLEMENTATIONS", registry.rest().IMPLEMENTATIONS)
        if not self.optimizer_impl:
            own_loop = self.state_dtype == "fp32" and self.dtype == "bf16"
            self._set("optimizer_impl", "loop" if own_loop else known[0])
        elif self.optimizer_impl not in known:
            raise UsageError(
                f"--optimizer-impl {self.optimizer_impl} is not available for "
                f"{chosen.update_name}.",
                f"Use {' or '.join(known)}, or leave it out.",
            )

    def _build(self, half: LayerHalf | UpdateHalf, given: Mapping[str, Any]) -> Any:
        """The half's settings: its own defaults, then what was published for this size, then
        what is given.
        """
        fields = registry.setting_fields(half)
        for key in given:
            if key not in fields:
                raise unknown(
                    "setting", key, fields, f"Settings of this method: {', '.join(fields)}."
                )
        values = published(half.FACTS, self.architecture, fields.keys())
        layer_rank = getattr(getattr(self, "_addressed", None), "rank", None)
        if "rank" in fields and layer_rank is not None:  # an update half on a layer half's factors
            values["rank"] = max(layer_rank // 4 // 8 * 8, 1)
        elif "rank" in fields and "rank" not in values:
            values["rank"] = self._default_rank()
        values |= {key: _parse(key, value, str(fields[key].type)) for key, value in given.items()}
        return half.Settings(**values)

    def _default_rank(self) -> int:
        """A quarter of the hidden width, a multiple of 8, below every targeted matrix's shorter
        side.
        """
        targeted = (m for m in self.architecture.layer_matrices() if m.block in self.targets)
        shorter = min(m.shorter for m in targeted)
        return max(min(self.architecture.hidden // 4, shorter - 1) // 8 * 8, 1)

    def _check_combinations(self) -> None:
        if self.device == "cpu":
            for name, unset in (("gpu", None), ("allocator", "default")):
                if getattr(self, name) != unset:
                    raise UsageError(
                        f"{flag(name)} has no effect with --device cpu.", f"Leave {flag(name)} out."
                    )
        if self.attention != "eager" and self.architecture.attention_softcap:
            raise UsageError(
                f"{self.architecture.model_type} caps attention scores, which "
                f"--attention {self.attention} cannot do.",
                "Use --attention eager.",
            )
        if self.seq_len < 2:
            raise UsageError("--seq-len 1 leaves nothing to predict.", "Type --seq-len 2 or more.")
        covers_all = self.halves.layer is None and "embedding" in self.halves.update.COVERS
        if covers_all and self.targets != TARGETS and not self.freeze_rest:
            raise UsageError(
                f"--targets has no effect: {self.method} takes every parameter.",
                "Add --freeze-rest, or leave --targets out.",
            )
        if self.seq_len > self.architecture.max_positions:
            raise UsageError(
                f"--seq-len {self.seq_len} exceeds the model's {self.architecture.max_positions} "
                f"positions.",
                f"Type --seq-len {self.architecture.max_positions} or less.",
            )
        if self.state_dtype == "fp32" and self.dtype != "bf16":
            raise UsageError(
                f"--state-dtype fp32 has no effect with --dtype {self.dtype}: the weights are "
                f"fp32 already.",
                "Leave --state-dtype out.",
            )
        if self.state_dtype == "fp32" and self.optimizer_impl != "loop":
            raise UsageError(
                f"--optimizer-impl {self.optimizer_impl} is not available with --state-dtype "
                f"fp32: torch's "
                "AdamW refuses fp32 moments on bf16 weights.",
                "Leave --optimizer-impl out.",
            )

    @property
    def architecture(self) -> Architecture:
        return architecture(self.model)

    @property
    def halves(self) -> Method:
        """The method's layer half and update half."""
        return registry.method(self.method, self.update)

    @property
    def layer_settings(self) -> Any:
        """The layer half's settings, or None for a dense layer."""
        return getattr(self, "_addressed") if self.halves.layer else None  # noqa: B009

    @property
    def optimizer_settings(self) -> Any:
        """The update half's settings."""
        return getattr(self, "_update")  # noqa: B009

    @property
    def rest_settings(self) -> Any:
        """AdamW's settings for what the update half does not cover: its own value of each name
        they share.
        """
        half = registry.rest()
        fields = registry.setting_fields(half)
        return half.Settings(**{k: v for k, v in self.update_settings.items() if k in fields})

    @property
    def positions(self) -> int:
        """Positions in one micro-batch."""
        return self.micro_batch * self.seq_len

    @property
    def weight_dtype(self) -> str:
        """The dtype parameters are stored in."""
        return "bf16" if self.dtype == "bf16" else "fp32"

    @property
    def compute_dtype(self) -> str:
        """The dtype matrix products run in."""
        return self.dtype.removeprefix("amp-")

    @property
    def amp(self) -> bool:
        return self.dtype.startswith("amp-")

    def as_dict(self) -> dict[str, Any]:
        """Every flag by its name, resolved; ``Plan(**plan.as_dict())`` is the same plan."""
        return {
            item.name: list(value) if isinstance(value, tuple) else value
            for item in dataclasses.fields(self)
            for value in [getattr(self, item.name)]
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def from_dict(values: Mapping[str, Any]) -> Plan:
    """A plan from flag names and values, as run.toml and JSON hold them. Raises UsageError."""
    known = {item.name for item in dataclasses.fields(Plan)}
    for key in values:
        if key not in known:
            raise unknown("plan field", key, known)
    values = {key: value for key, value in values.items() if value is not None}
    if "model" not in values:
        raise UsageError(
            "No model was given.", "Type for example --model 60m; `effprof models` lists them."
        )
    if isinstance(values.get("targets"), list):
        values["targets"] = tuple(values["targets"])
    return Plan(**values)


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def published(facts: Facts, shape: Architecture, keys: Any) -> dict[str, Any]:
    """Settings published for this size.

    Those of the nearest published size, but never another size's rank.
    """
    if not facts.defaults:
        return {}
    nearest = nearest_size(tuple(facts.defaults), shape)
    values: dict[str, Any] = {}
    for key in keys:
        sizes = tuple(size for size, known in facts.defaults.items() if key in known)
        if key == "rank":
            same = architecture(nearest) == dataclasses.replace(shape, name=nearest)
            if same and key in facts.defaults[nearest]:
                values[key] = facts.defaults[nearest][key]
        elif sizes:
            values[key] = facts.defaults[nearest_size(sizes, shape)][key]
    return values


def nearest_size(sizes: tuple[str, ...], shape: Architecture) -> str:
    """The preset size whose parameter count is nearest by ratio."""

    def distance(size: str) -> float:
        ratio = architecture(size).parameters / shape.parameters
        return max(ratio, 1 / ratio)

    return min(sizes, key=distance)


_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "bool": (bool,),
    "Mapping[str, Any]": (Mapping,),
    "tuple[str, ...]": (tuple,),
    "None": (type(None),),
}


def _check_type(name: str, declared: str, value: Any) -> None:
    """A value from a file may have any type; UsageError where it is not the field's."""
    kinds = tuple(kind for part in declared.split(" | ") for kind in _KINDS[part])
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise UsageError(
            f"{flag(name)} cannot be {value!r}.",
            f"Give {declared.split(' | ')[0].split('[')[0].lower()} for {name}.",
        )


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise UsageError(
            f"{flag(name)} must be a positive whole number, not {value!r}.",
            f"Type for example {flag(name)} 8.",
        )


def _parse(key: str, value: Any, kind: str) -> Any:
    """A setting's text as its declared type. Raises UsageError."""
    try:
        if kind == "bool":
            return {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]
        if kind == "int":
            if isinstance(value, float) and not value.is_integer():
                raise ValueError
            return int(value)
        if kind == "float":
            return float(value)
        if kind.startswith("tuple"):
            parts = value.split(",") if isinstance(value, str) else value
            return tuple(float(part) for part in parts)
        return str(value)
    except (ValueError, KeyError, TypeError):
        example = {"bool": "true", "int": "8", "float": "0.25"}.get(kind, "0.9,0.999")
        raise UsageError(
            f"{key} {value!r} is not a valid {kind.split('[')[0]}.",
            f"Type for example --set {key}={example}.",
        ) from None
