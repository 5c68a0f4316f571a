"""What an update half declares to hold for a moment, against what its update is seen to hold."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from effprof import gpus, registry
from effprof.errors import UsageError
from effprof.plan import Plan
from effprof.registry import phases
from effprof.step import Step, work_out
from effprof.tracer.recorder import FakeRecorder
from effprof.tracer.rules import casts, rules
from effprof.tracer.trace import _materialised, _quiet
from effprof.trained import Trained
from effprof.trainer.build import arranged, trained_parameters
from effprof.trainer.layer import MethodLinear
from effprof.trainer.optimizer import MethodOptimizer

UPDATE = 1  # a steady one


def declared(step: Step, kept: Trained) -> int:
    """The most bytes of any stage of a steady update."""
    half, settings = step.plan.recipe.half(covered=kept.covered)
    wanted = phases(half, settings, UPDATE)
    stages = [v for name, v in kept.transient.items() if name.partition(":")[0] in wanted]
    return max((sum(map(step.nbytes, stage)) for stage in stages), default=0)


def held(recorder: FakeRecorder, start: int) -> int:
    live = most = 0
    for _, size in recorder.tape.events[start:]:
        live += size
        most = max(most, live)
    return most


@pytest.mark.parametrize("states", ["", "fp32", "8bit"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("name", registry.names())
def test_declared_is_traced(name: str, device: str, states: str) -> None:
    try:
        plan = Plan(model="9m", method=name, device=device, state_dtype=states)
    except UsageError as refused:
        pytest.skip(f"refused: {refused}")
    step = work_out(plan)
    bare = arranged(step)
    recorder = FakeRecorder(rules(plan, gpus.DEFAULT), casts if device == "cpu" else None)
    with _quiet(plan), recorder, torch.no_grad():
        recorder.mark("steady", "update")
        model = _materialised(bare, plan)
        layers = [module for module in model.modules() if isinstance(module, MethodLinear)]
        recipe = dataclasses.replace(plan.recipe, per_layer_update=False)
        optimizer = MethodOptimizer(recipe, trained_parameters(step, model), 1e-3, layers=layers)
        optimizer.seek(UPDATE)
        for layer in layers:
            for key, tensor in layer.tensors().items():
                if isinstance(tensor, torch.nn.Parameter) and not tensor.is_floating_point():
                    layer.gradients[key] = torch.empty(tensor.shape, dtype=torch.bfloat16)
        seen = 0
        for cell in optimizer._distinct:
            floating = [p for p in cell.parameters if p.is_floating_point()]
            if cell.trained.hosted or not all(p.requires_grad for p in floating):
                continue
            for parameter in floating:
                parameter.grad = torch.empty_like(parameter)
            if not cell.group.state:
                optimizer._begin(cell)
            start = len(recorder.tape.events)
            optimizer._update(cell)
            size = sum(parameter.numel() for parameter in cell.parameters)
            if size >= 4096:
                expected = declared(step, cell.trained)
                assert held(recorder, start) == pytest.approx(expected, rel=0.04, abs=0.1 * size)
                seen += 1
    assert seen or all(cell.trained.hosted for cell in optimizer._distinct)
