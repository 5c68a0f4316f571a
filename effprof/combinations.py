"""Settings that do not go together, and those that would do nothing: each is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from effprof.errors import UsageError
from effprof.fields import TARGETS, flag

if TYPE_CHECKING:
    from effprof.plan import Plan


def check_combinations(plan: Plan) -> None:
    """Raise UsageError where settings do not go together, or one has no effect."""
    if plan.device == "cpu":
        for name, unset in (("gpu", None), ("allocator", "default")):
            if getattr(plan, name) != unset:
                raise UsageError(
                    f"{flag(name)} has no effect with --device cpu.", f"Leave {flag(name)} out."
                )
    shape = plan.architecture
    if plan.attention != "eager" and shape.eager:
        raise UsageError(
            f"{shape.model_type} caps attention scores: transformers has only its own attention "
            f"for it, not --attention {plan.attention}.",
            "Use --attention eager.",
        )
    aligned = 4 if plan.compute_dtype == "fp32" else 8
    if shape.experts and (shape.hidden % aligned or shape.intermediate % aligned):
        raise UsageError(
            f"{shape.name}'s experts are {shape.hidden} × {shape.intermediate}: torch multiplies "
            f"stacked matrices whose sides are multiples of {aligned} in {plan.compute_dtype}.",
            "Correct config.json.",
        )
    if plan.seq_len < 2:
        raise UsageError("--seq-len 1 leaves nothing to predict.", "Type --seq-len 2 or more.")
    _refuse_declared(plan, "freeze_rest", "NOT_FREEZE_REST", plan.freeze_rest)
    covers_all = plan.halves.layer is None and "embedding" in plan.halves.update.COVERS
    if covers_all and plan.targets != TARGETS and not plan.freeze_rest:
        raise UsageError(
            f"--targets has no effect: {plan.method} takes every parameter.",
            "Add --freeze-rest, or leave --targets out.",
        )
    if plan.seq_len > plan.architecture.max_positions:
        raise UsageError(
            f"--seq-len {plan.seq_len} exceeds the model's {plan.architecture.max_positions} "
            f"positions.",
            f"Type --seq-len {plan.architecture.max_positions} or less.",
        )
    _check_loss(plan)
    _check_states(plan)
    check_per_layer(plan)
    if plan.parallel == "fsdp":
        _check_sharding(plan)


def _check_loss(plan: Plan) -> None:
    if not 0 <= plan.z_loss < 1:
        raise UsageError(f"--z-loss {plan.z_loss} is not in [0, 1).", "Type --z-loss 1e-4.")
    if plan.loss != "chunked":
        if plan.z_loss:
            raise UsageError(
                f"--z-loss {plan.z_loss} needs the logits of --loss chunked, which holds a "
                f"few at a time.",
                "Add --loss chunked.",
            )
        return
    if plan.keep_logits:
        raise UsageError(
            "--keep-logits has no effect with --loss chunked: there are no logits to keep.",
            "Leave --keep-logits out.",
        )
    if plan.compile:
        raise UsageError(
            "--compile does not go with --loss chunked, which runs the decoder by itself.",
            "Leave one of them out.",
        )
    if plan.architecture.config.get("output_router_logits"):
        raise UsageError(
            "--loss chunked leaves out the router's loss that output_router_logits adds.",
            "Use --loss standard.",
        )
    if plan.architecture.logit_softcap:
        raise UsageError(
            f"--loss chunked is not available for {plan.architecture.model_type}, which caps "
            f"its logits.",
            "Use --loss standard.",
        )


def _check_wide(plan: Plan) -> None:
    """Updates that see fp32 weights need weights of 16 bits, and say where states are fp32."""
    for name, given in (("master_weights", "fp32"), ("rounding", "stochastic")):
        if getattr(plan, name) != given:
            continue
        shown = f"{flag(name)} {given}"
        if plan.weight_dtype == "fp32":
            raise UsageError(
                f"{shown} has no effect with --dtype {plan.dtype}: the weights are fp32.",
                f"Use --dtype bf16, or leave {flag(name)} out.",
            )
        _refuse_declared(plan, name, "NOT_WIDE", True)
        if plan.optimizer_impl != "loop":
            raise UsageError(
                f"--optimizer-impl {plan.optimizer_impl} is not available with {shown}: "
                f"tensors are updated one by one.",
                "Leave --optimizer-impl out.",
            )
    if plan.rounding == "stochastic":
        _check_rounding(plan)


def _check_rounding(plan: Plan) -> None:
    if plan.master_weights == "fp32" or plan.weight_dtype != "bf16":
        raise UsageError(
            "--rounding stochastic is of bf16 weights that have no masters.",
            "Use --dtype bf16 without --master-weights.",
        )
    if plan.state_dtype == "same" and _has_states(plan):
        raise UsageError(
            "--rounding stochastic needs optimizer states that are not bf16.",
            "Add --state-dtype fp32, or --state-dtype 8bit.",
        )


def _check_states(plan: Plan) -> None:
    if plan.wide:
        _check_wide(plan)
    if plan.state_dtype == "same":
        return
    if plan.state_dtype == "fp32" and plan.master_weights == "fp32":
        raise UsageError(
            "--state-dtype fp32 has no effect with --master-weights fp32: states have the "
            "masters' dtype.",
            "Leave --state-dtype out.",
        )
    if plan.state_dtype == "fp32" and plan.weight_dtype == "fp32":
        raise UsageError(
            f"--state-dtype fp32 has no effect with --dtype {plan.dtype}: the weights are "
            f"fp32 already.",
            "Leave --state-dtype out.",
        )
    if plan.optimizer_impl != "loop":
        raise UsageError(
            f"--optimizer-impl {plan.optimizer_impl} is not available with --state-dtype "
            f"{plan.state_dtype}: torch's AdamW keeps moments in the weights' dtype.",
            "Leave --optimizer-impl out.",
        )
    _refuse_declared(plan, "state_dtype", "NOT_8BIT", plan.state_dtype == "8bit")
    if not _has_states(plan):
        raise UsageError(
            f"--state-dtype {plan.state_dtype} has no effect: {plan.update} keeps no state "
            f"of the plan's dtype.",
            "Leave --state-dtype out.",
        )


def _refuse_declared(plan: Plan, name: str, attribute: str, hit: bool) -> None:
    """Refuse a flag that one of the method's halves says it does not go with."""
    for half in (plan.halves.layer, plan.halves.update):
        if hit and hasattr(half, attribute):
            value = getattr(plan, name)
            shown = flag(name) if value is True else f"{flag(name)} {value}"
            raise UsageError(
                f"{shown} does not go with {plan.method}: {getattr(half, attribute)}.",
                f"Leave {flag(name)} out.",
            )


def _has_states(plan: Plan) -> bool:
    """Whether any tensor of the plan has a state whose dtype the plan decides."""
    if not plan.halves.covers_all and not plan.freeze_rest:
        return True  # the rest is AdamW
    return plan.recipe.has_states(plan.architecture.layer_matrices()[0])


def check_per_layer(plan: Plan) -> None:
    if not plan.per_layer_update:
        if plan.halves.fused_backward:
            raise UsageError(
                f"{plan.update} updates each tensor in backward: that is what it is.",
                "Leave --per-layer-update at its default.",
            )
        return
    _refuse_declared(plan, "per_layer_update", "NOT_PER_LAYER", True)
    refused = (
        ("grad_accum", plan.grad_accum > 1, "a gradient is gone before the next micro-batch"),
        ("zero_grad", plan.zero_grad == "zero", "gradients are freed in backward"),
        ("optimizer_impl", plan.optimizer_impl == "foreach", "tensors are updated one by one"),
    )
    for name, hit, reason in refused:
        if hit:
            raise UsageError(
                f"{flag(name)} {getattr(plan, name)} does not go with --per-layer-update: "
                f"{reason}.",
                f"Leave {flag(name)} out.",
            )


def _check_sharding(plan: Plan) -> None:
    _refuse_declared(plan, "parallel", "NOT_FSDP", True)
    refused = (
        (
            plan.per_layer_update,
            "--per-layer-update" if not plan.halves.fused_backward else plan.update,
            "FSDP has the gradients of a whole decoder layer at once, and as shards",
        ),
        (
            plan.master_weights == "fp32",
            "--master-weights fp32",
            "with --dtype amp-bf16 its shards are fp32 already",
        ),
        (plan.compile, "--compile", "effprof has not tried them together"),
        (
            plan.architecture.foreign,
            f"a model of type {plan.architecture.model_type}",
            "its decoder layers are not known",
        ),
    )
    for hit, what, reason in refused:
        if hit:
            raise UsageError(
                f"--parallel fsdp does not go with {what}: {reason}.", "Use --parallel ddp."
            )
