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
from effprof.architectures import architecture
from effprof.combinations import check_combinations, check_per_layer
from effprof.errors import UsageError, unknown
from effprof.fields import TARGETS, check_choices, check_type
from effprof.model import Architecture
from effprof.recipe import Recipe, Size, preset_of, resolve
from effprof.registry import Method, due


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
        check_combinations(self)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_values(self) -> None:
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        for item in dataclasses.fields(self):
            if values[item.name] is not None or item.default is not None:
                check_type(item.name, str(item.type), values[item.name])
        check_choices(values)
        Settings.of(self.allocator)
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
            torchs = self.state_dtype == "same" and not self.wide
            self._set("optimizer_impl", known[0] if torchs else "loop")

    def _default_rank(self) -> int:
        """A quarter of the hidden width, a multiple of 8, below every targeted matrix's shorter
        side.
        """
        targeted = (m for m in self.architecture.layer_matrices() if m.block in self.targets)
        shorter = min(m.shorter for m in targeted)
        return max(min(self.architecture.hidden // 4, shorter - 1) // 8 * 8, 1)

    @property
    def wide(self) -> bool:
        """Whether updates see fp32 weights where the model's have 16 bits."""
        return self.master_weights == "fp32" or self.rounding == "stochastic"

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
        check_per_layer(found)
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
