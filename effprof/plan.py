"""Plan: what the user asks for, resolved and checked.

Every common flag is a field of the same name.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from effprof import registry
from effprof.allocator import Settings
from effprof.errors import UsageError, unknown
from effprof.model import Architecture, architecture
from effprof.recipe import Recipe, Size, preset_of, resolve
from effprof.registry import Method, due

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
    state_dtype: str = ""
    master_weights: str = "none"
    rounding: str = "nearest"
    checkpointing: str = "none"
    attention: str = "sdpa"
    attention_mask: str = "none"
    loss: str = "standard"
    z_loss: float = 0.0
    rows: str = "packed"
    per_layer_update: bool | None = None
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
            if value not in known and not (name in ("optimizer_impl", "state_dtype") and not value):
                raise unknown(flag(name), str(value), known)
        Settings.of(self.allocator)
        for name in ("micro_batch", "seq_len", "gpus"):
            _positive(name, getattr(self, name))
        if self.gpus > _MOST_GPUS:
            raise UsageError(
                f"--gpus {self.gpus} is more than the {_MOST_GPUS:,} that are reckoned with.",
                "Type fewer.",
            )
        for name in ("grad_accum", "global_batch", "rank", "tokens"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        for target in self.targets or ("",):
            if target not in TARGETS:
                raise unknown("--targets value", str(target), TARGETS)
        self._set("targets", tuple(target for target in TARGETS if target in self.targets))
        self._resolve_parallel()

    def _resolve_parallel(self) -> None:
        """Several GPUs hold replicas of the model unless it is to be sharded."""
        if self.gpus == 1 and self.parallel != "none":
            raise UsageError(
                f"--parallel {self.parallel} has no effect on one GPU.",
                "Add --gpus 2 or more, or leave --parallel out.",
            )
        if self.gpus > 1 and self.parallel == "none":
            self._set("parallel", "ddp")

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
        shape = self.architecture
        if shape.experts and "attention" not in self.targets:
            raise UsageError(
                f"--targets mlp leaves nothing: {shape.name}'s experts are stacked in one tensor, "
                f"which no method takes.",
                "Type --targets attention.",
            )
        sizes = tuple(registry.published_sizes(self.method or registry.default(), self.update))
        found = resolve(
            self.method,
            self.update,
            self.rank,
            self.settings,
            self.update_settings,
            Size(shape.parameters, preset_of(shape, sizes), self._default_rank),
        )
        chosen, layer, update = found.halves, found.layer_settings, found.optimizer_settings
        self._set("method", chosen.name)
        self._set("update", chosen.update_name)
        addressed = update if layer is None else layer
        self._set("settings", dataclasses.asdict(addressed))
        self._set("update_settings", dataclasses.asdict(update))
        self._set("rank", self.settings.get("rank"))
        if self.per_layer_update is None:
            self._set("per_layer_update", chosen.fused_backward)
        if not self.state_dtype:
            self._set("state_dtype", getattr(chosen.update, "STATE_DTYPE", "same"))
        self._resolve_implementation(chosen)
        self._set(
            "_recipe",
            dataclasses.replace(
                found,
                state_dtype=self.state_dtype,
                optimizer_impl=self.optimizer_impl,
                per_layer_update=bool(self.per_layer_update),
                master_weights=self.master_weights,
                rounding=self.rounding,
            ),
        )

    def _resolve_implementation(self, chosen: Method) -> None:
        """Which of torch's AdamW runs: for the method, or for what it does not cover."""
        known = registry.rest().IMPLEMENTATIONS
        # Experts are one tensor of three dimensions, which no update half takes.
        takes_all = self.freeze_rest or (chosen.covers_all and not self.architecture.experts)
        if takes_all and chosen.hosted is None:
            if self.optimizer_impl not in ("", "loop"):
                raise UsageError(
                    f"--optimizer-impl {self.optimizer_impl} has no effect: nothing is left to "
                    f"AdamW.",
                    "Leave --optimizer-impl out.",
                )
            self._set("optimizer_impl", "loop")
        if not self.optimizer_impl:
            # Moments of another dtype than the weights' are updated by a loop of our own.
            torchs = self.state_dtype == "same" and not self._wide
            self._set("optimizer_impl", known[0] if torchs else "loop")

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
        self._refuse_declared("freeze_rest", "NOT_FREEZE_REST", self.freeze_rest)
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
        self._check_loss()
        self._check_states()
        self._check_per_layer()
        if self.parallel == "fsdp":
            self._check_sharding()

    def _check_loss(self) -> None:
        if not 0 <= self.z_loss < 1:
            raise UsageError(f"--z-loss {self.z_loss} is not in [0, 1).", "Type --z-loss 1e-4.")
        if self.loss != "chunked":
            if self.z_loss:
                raise UsageError(
                    f"--z-loss {self.z_loss} needs the logits of --loss chunked, which holds a "
                    f"few at a time.",
                    "Add --loss chunked.",
                )
            return
        if self.keep_logits:
            raise UsageError(
                "--keep-logits has no effect with --loss chunked: there are no logits to keep.",
                "Leave --keep-logits out.",
            )
        if self.compile:
            raise UsageError(
                "--compile does not go with --loss chunked, which runs the decoder by itself.",
                "Leave one of them out.",
            )
        if self.architecture.config.get("output_router_logits"):
            raise UsageError(
                "--loss chunked leaves out the router's loss that output_router_logits adds.",
                "Use --loss standard.",
            )
        if self.architecture.logit_softcap:
            raise UsageError(
                f"--loss chunked is not available for {self.architecture.model_type}, which caps "
                f"its logits.",
                "Use --loss standard.",
            )

    @property
    def _wide(self) -> bool:
        return self.master_weights == "fp32" or self.rounding == "stochastic"

    def _check_wide(self) -> None:
        """Updates that see fp32 weights need weights of 16 bits, and say where states are fp32."""
        for name, given in (("master_weights", "fp32"), ("rounding", "stochastic")):
            if getattr(self, name) != given:
                continue
            shown = f"{flag(name)} {given}"
            if self.weight_dtype == "fp32":
                raise UsageError(
                    f"{shown} has no effect with --dtype {self.dtype}: the weights are fp32.",
                    f"Use --dtype bf16, or leave {flag(name)} out.",
                )
            self._refuse_declared(name, "NOT_WIDE", True)
            if self.optimizer_impl != "loop":
                raise UsageError(
                    f"--optimizer-impl {self.optimizer_impl} is not available with {shown}: "
                    f"tensors are updated one by one.",
                    "Leave --optimizer-impl out.",
                )
        if self.rounding == "stochastic":
            self._check_rounding()

    def _check_rounding(self) -> None:
        if self.master_weights == "fp32" or self.weight_dtype != "bf16":
            raise UsageError(
                "--rounding stochastic is of bf16 weights that have no masters.",
                "Use --dtype bf16 without --master-weights.",
            )
        if self.state_dtype == "same" and self._has_states():
            raise UsageError(
                "--rounding stochastic needs optimizer states that are not bf16.",
                "Add --state-dtype fp32, or --state-dtype 8bit.",
            )

    def _check_states(self) -> None:
        if self._wide:
            self._check_wide()
        if self.state_dtype == "same":
            return
        if self.state_dtype == "fp32" and self.master_weights == "fp32":
            raise UsageError(
                "--state-dtype fp32 has no effect with --master-weights fp32: states have the "
                "masters' dtype.",
                "Leave --state-dtype out.",
            )
        if self.state_dtype == "fp32" and self.weight_dtype == "fp32":
            raise UsageError(
                f"--state-dtype fp32 has no effect with --dtype {self.dtype}: the weights are "
                f"fp32 already.",
                "Leave --state-dtype out.",
            )
        if self.optimizer_impl != "loop":
            raise UsageError(
                f"--optimizer-impl {self.optimizer_impl} is not available with --state-dtype "
                f"{self.state_dtype}: torch's AdamW keeps moments in the weights' dtype.",
                "Leave --optimizer-impl out.",
            )
        self._refuse_declared("state_dtype", "NOT_8BIT", self.state_dtype == "8bit")
        if not self._has_states():
            raise UsageError(
                f"--state-dtype {self.state_dtype} has no effect: {self.update} keeps no state "
                f"of the plan's dtype.",
                "Leave --state-dtype out.",
            )

    def _refuse_declared(self, name: str, attribute: str, hit: bool) -> None:
        """Refuse a flag that one of the method's halves says it does not go with."""
        for half in (self.halves.layer, self.halves.update):
            if hit and hasattr(half, attribute):
                value = getattr(self, name)
                shown = flag(name) if value is True else f"{flag(name)} {value}"
                raise UsageError(
                    f"{shown} does not go with {self.method}: {getattr(half, attribute)}.",
                    f"Leave {flag(name)} out.",
                )

    def _has_states(self) -> bool:
        """Whether any tensor of the plan has a state whose dtype the plan decides."""
        if not self.halves.covers_all and not self.freeze_rest:
            return True  # the rest is AdamW
        return self.recipe.has_states(self.architecture.layer_matrices()[0])

    def _check_per_layer(self) -> None:
        if not self.per_layer_update:
            if self.halves.fused_backward:
                raise UsageError(
                    f"{self.update} updates each tensor in backward: that is what it is.",
                    "Leave --per-layer-update at its default.",
                )
            return
        self._refuse_declared("per_layer_update", "NOT_PER_LAYER", True)
        refused = (
            ("grad_accum", self.grad_accum > 1, "a gradient is gone before the next micro-batch"),
            ("zero_grad", self.zero_grad == "zero", "gradients are freed in backward"),
            ("optimizer_impl", self.optimizer_impl == "foreach", "tensors are updated one by one"),
        )
        for name, hit, reason in refused:
            if hit:
                raise UsageError(
                    f"{flag(name)} {getattr(self, name)} does not go with --per-layer-update: "
                    f"{reason}.",
                    f"Leave {flag(name)} out.",
                )

    def _check_sharding(self) -> None:
        self._refuse_declared("parallel", "NOT_FSDP", True)
        refused = (
            (
                self.per_layer_update,
                "--per-layer-update" if not self.halves.fused_backward else self.update,
                "FSDP has the gradients of a whole decoder layer at once, and as shards",
            ),
            (
                self.master_weights == "fp32",
                "--master-weights fp32",
                "with --dtype amp-bf16 its shards are fp32 already",
            ),
            (self.compile, "--compile", "effprof has not tried them together"),
            (
                self.architecture.foreign,
                f"a model of type {self.architecture.model_type}",
                "its decoder layers are not known",
            ),
        )
        for hit, what, reason in refused:
            if hit:
                raise UsageError(
                    f"--parallel fsdp does not go with {what}: {reason}.", "Use --parallel ddp."
                )

    @property
    def architecture(self) -> Architecture:
        return architecture(self.model)

    @property
    def recipe(self) -> Recipe:
        """The method's halves with every setting resolved."""
        return getattr(self, "_recipe")  # type: ignore[no-any-return]  # noqa: B009

    @property
    def halves(self) -> Method:
        """The method's layer half and update half."""
        return self.recipe.halves

    @property
    def layer_settings(self) -> Any:
        """The layer half's settings, or None for a dense layer."""
        return self.recipe.layer_settings

    @property
    def optimizer_settings(self) -> Any:
        """The update half's settings."""
        return self.recipe.optimizer_settings

    @property
    def updates(self) -> tuple[tuple[str, int], ...]:
        """The updates an estimate replays and a probe measures: (kind, number).

        A first, a steady one, and one for each half's periodic event.
        """
        layers = self.architecture.layers
        found = [due(half, settings, layers) for half, settings in self.recipe.hooked()]
        periodic = [("periodic", number) for numbers in found for number in numbers]
        return (("first", 0), ("steady", 1), *dict.fromkeys(periodic))

    @property
    def positions(self) -> int:
        """Positions in one micro-batch."""
        return self.micro_batch * self.seq_len

    @property
    def loss_rows(self) -> int:
        """Positions whose logits a chunked loss holds at once: about as many numbers as the hidden
        states of all, a power of two and at least 128 (a matrix product's tile).
        """
        shape = self.architecture
        share = -(-self.positions // -(-shape.vocab // shape.hidden))
        return min(max(1 << (share - 1).bit_length(), 128), self.positions)

    @property
    def weight_dtype(self) -> str:
        """The dtype parameters are stored in."""
        return self.dtype if self.dtype in ("bf16", "fp16") else "fp32"

    @property
    def compute_dtype(self) -> str:
        """The dtype matrix products run in."""
        return self.dtype.removeprefix("amp-")

    @property
    def amp(self) -> bool:
        return self.dtype.startswith("amp-")

    def alone(self) -> Plan:
        """The same plan on one GPU, at the same micro-batch and accumulation."""
        return from_dict({**self.as_dict(), "gpus": 1, "parallel": "none", "global_batch": None})

    def with_batch(self, micro_batch: int, grad_accum: int) -> Plan:
        """The same plan at another batch; nothing else that is resolved depends on it.

        Raises UsageError where the plan does not take it.
        """
        found = copy.copy(self)
        found._set("micro_batch", micro_batch)
        found._set("grad_accum", grad_accum)
        found._set("global_batch", micro_batch * grad_accum * self.gpus)
        found._check_per_layer()
        return found

    def with_rank(self, rank: int) -> Plan:
        """The same plan at another rank of its update half; nothing else that is resolved depends
        on it. Whether matrices take it `work_out` says.
        """
        assert self.halves.layer is None
        assert self.rank is not None
        found = copy.copy(self)
        chosen = dataclasses.replace(self.optimizer_settings, rank=rank)
        settings = dataclasses.asdict(chosen)
        for name, value in (("rank", rank), ("settings", settings), ("update_settings", settings)):
            found._set(name, value)
        found._set("_recipe", dataclasses.replace(self.recipe, optimizer_settings=chosen))
        return found

    @property
    def autocast(self) -> bool:
        """Whether torch's autocast casts weights; FSDP gathers them in the compute dtype itself."""
        return self.amp and self.parallel != "fsdp"

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


def check_alone(plan: Plan, what: str) -> None:
    """Raise UsageError for several GPUs where ``what`` runs on one."""
    if plan.gpus > 1:
        raise UsageError(
            f"--gpus {plan.gpus} is not available here: {what} runs one process.",
            "Use --gpus 1; effprof estimate answers for several.",
        )


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


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


def _check_type(name: str, declared: str, value: Any) -> None:
    """A value from a file may have any type; UsageError where it is not the field's."""
    kinds = tuple(kind for part in declared.split(" | ") for kind in _KINDS[part])
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise UsageError(
            f"{flag(name)} cannot be {value!r}.",
            f"Give {_WORDS[declared.split(' | ')[0].split('[')[0]]} for {name}.",
        )


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise UsageError(
            f"{flag(name)} must be a positive whole number, not {value!r}.",
            f"Type for example {flag(name)} 8.",
        )
