"""FLOPs of one optimizer update: dense-equivalent, executed, and the optimizer's own.

A multiply-add counts 2.

Products only, except where a column says otherwise; attention counts the full square, as torch's
counter does.
"""

from __future__ import annotations

from dataclasses import dataclass

from effprof import registry
from effprof.model import Architecture, Matrix
from effprof.registry import Flops
from effprof.step import Step, Unit


@dataclass(frozen=True, slots=True)
class UpdateFlops:
    """FLOPs per optimizer update, all micro-steps included.

    ``forward_per_token`` is of the method's own forward.
    """

    forward_per_token: float
    dense_equivalent: int
    executed: int
    update: int
    periodic: float


def flops(step: Step) -> UpdateFlops:
    """Count a step's FLOPs from what each unit declares."""
    plan, shape = step.plan, step.architecture
    tokens = plan.positions
    attention = attention_forward(shape, tokens, plan.seq_len)
    dense_forward = attention + 2 * tokens * _multiplied(step)
    forward, backward = attention, 2 * attention
    layers_forward = attention
    for unit, times in step.units():
        one_forward, one_backward = _unit_products(step, unit, tokens)
        forward += times * one_forward
        backward += times * one_backward
        if unit in step.layer:
            layers_forward += times * one_forward
    if shape.tied:
        head = 2 * tokens * shape.vocab * shape.hidden
        forward += head
        backward += _dense_backward(head, trainable=not plan.freeze_rest)
    backward -= _unneeded_gradients(step, tokens)
    recomputed = 0
    if plan.checkpointing == "full":
        recomputed = layers_forward - _never_recomputed(step, tokens)
    update, periodic = _optimizer(step)
    return UpdateFlops(
        forward_per_token=forward / tokens,
        dense_equivalent=3 * dense_forward * plan.grad_accum,
        executed=(forward + backward + recomputed) * plan.grad_accum,
        update=update,
        periodic=periodic,
    )


def attention_forward(shape: Architecture, tokens: int, seq_len: int) -> int:
    """Scores and weighted values of every layer, the full square."""
    return 4 * tokens * seq_len * shape.heads * shape.head_dim * shape.layers


def _multiplied(step: Step) -> int:
    """Weights a token is multiplied by in the dense model: the linear layers and the head."""
    shape = step.architecture
    layer = sum(matrix.numel for matrix in shape.layer_matrices())
    return shape.layers * layer + shape.vocab * shape.hidden


def _unit_products(step: Step, unit: Unit, tokens: int) -> tuple[int, int]:
    """Forward and backward products of one unit for one micro-batch."""
    matrix = unit.matrix
    if matrix.flat or matrix.kind == "embedding":
        return 0, 0
    if unit.layer_half:
        half = step.plan.halves.layer
        assert half is not None
        declared: Flops = half.flops(matrix, tokens, step.plan.layer_settings)
        return sum(declared.forward.values()), sum(declared.backward.values())
    forward = 2 * tokens * matrix.numel
    return forward, _dense_backward(forward, trainable=bool(unit.trained))


def _dense_backward(forward: int, *, trainable: bool) -> int:
    """One product for the input's gradient, one for the weight's where it is trained."""
    return forward * (2 if trainable else 1)


def _never_recomputed(step: Step, tokens: int) -> int:
    """Each layer's last dense product: recomputing ends before it, nothing after is saved."""
    last = next(unit for unit in step.layer if unit.matrix.kind == "down")
    return 0 if last.layer_half else step.architecture.layers * 2 * tokens * last.matrix.numel


def _unneeded_gradients(step: Step, tokens: int) -> int:
    """With the rest frozen, nothing before the first trained matrices has a gradient.

    Under checkpointing transformers makes the first layer's input require one, so all are formed.
    """
    plan, shape = step.plan, step.architecture
    if not plan.freeze_rest or plan.checkpointing == "full":
        return 0
    if "attention" in plan.targets:
        return _dense_inputs(step, "attention_input", tokens)
    passed = _dense_inputs(step, "attention_input", tokens)
    passed += _dense_inputs(step, "attention_output", tokens)
    passed += 2 * attention_forward(shape, tokens, plan.seq_len) // shape.layers
    return passed + _dense_inputs(step, "mlp_input", tokens)


def _dense_inputs(step: Step, reads: str, tokens: int) -> int:
    """Products that form the gradient of an activation of a layer, where dense layers read it."""
    units = (u for u in step.layer if u.matrix.reads == reads and not u.layer_half)
    return sum(2 * tokens * unit.matrix.numel for unit in units)


def _optimizer(step: Step) -> tuple[int, float]:
    """The optimizer's products and elementwise work per update, and its amortised periodic work."""
    update, periodic = 0, 0.0
    method, plan = step.plan.halves, step.plan
    for unit, times in step.units():
        for trained in unit.trained:
            settings = plan.optimizer_settings if trained.covered else plan.rest_settings
            half = method.update if trained.covered else registry.rest()
            own: Matrix = trained.matrix
            declared = half.flops(own, plan.positions, settings)
            update += times * (sum(declared.update.values()) + sum(declared.elementwise.values()))
            periodic += times * sum(declared.periodic.values())
    return update, periodic
