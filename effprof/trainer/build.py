"""Build a plan for real: a transformers model with the method's layers, and its optimizer."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from effprof.allocator import Settings, configuration, of_environment
from effprof.errors import NoDeviceError, UsageError, said
from effprof.plan import Plan
from effprof.step import Step, Unit, layer_of, work_out
from effprof.trained import Trained
from effprof.trainer.layer import DTYPES, MethodLinear
from effprof.trainer.optimizer import MethodOptimizer
from effprof.trainer.step import Whole

if TYPE_CHECKING:
    from effprof.trainer.sharding import Shards

# SDPA's backend is chosen around the forward; transformers is always told which of its two code
# paths to take.
ATTENTION = {"sdpa": "sdpa", "math": "sdpa", "eager": "eager"}


def build(
    plan: Plan, device: str | None = None, *, lr: float = 1e-3, seed: int = 0
) -> tuple[nn.Module, MethodOptimizer]:
    """The model and the optimizer of a plan, on ``device`` (the plan's by default), freshly
    initialised.

    Raises NoDeviceError where a GPU is asked for and there is none.
    """
    place = resolve_device(device or plan.device, plan.allocator)
    step = work_out(plan)
    shards, kind = None, MethodOptimizer
    if plan.parallel == "fsdp":
        from effprof.trainer.sharding import ShardedOptimizer, Shards

        shards, kind = Shards(plan, place), ShardedOptimizer
    model = build_model(step, place, seed=seed, shards=shards)
    if plan.compile:
        model.compile()
    layers = [module for module in model.modules() if isinstance(module, MethodLinear)]
    trained = trained_parameters(step, model)
    optimizer = kind(plan.recipe, trained, lr, layers=layers, seed=seed)
    optimizer.whole = shards.whole if shards else Whole(model, plan)
    return model, optimizer


def resolve_device(name: str, allocator: str | None = None) -> torch.device:
    """The torch device of a name; with an ``allocator`` that is set up. Raises NoDeviceError, and
    UsageError where the environment sets up another.
    """
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise NoDeviceError(
                "No CUDA GPU is available here.", "Add --device cpu to run on the CPU."
            )
        if allocator is not None:
            check_environment(allocator)
        if allocator not in (None, "default"):
            torch._C._accelerator_setAllocatorSettings(configuration(allocator))
    return torch.device(name)


def check_environment(allocator: str) -> None:
    """Raise UsageError where the environment sets an allocator that is not the plan's."""
    theirs = of_environment()
    if theirs != "default" and Settings.of(theirs) != Settings.of(allocator):
        raise UsageError(
            f"The environment sets the allocator to {theirs}, the plan's is {allocator}.",
            f"Type --allocator {theirs}, or unset PYTORCH_ALLOC_CONF and PYTORCH_CUDA_ALLOC_CONF.",
        )


def build_model(
    step: Step, device: torch.device, *, seed: int, shards: Shards | None = None
) -> nn.Module:
    """The model on meta, its targeted layers swapped, then allocated once on ``device`` and
    initialised.

    With ``shards`` one decoder layer at a time is whole.
    """
    model = arranged(step)
    layers: list[nn.Module] = [] if shards is None else list(model.get_decoder().layers)  # type: ignore[operator]
    inside = {module for layer in layers for module in layer.modules()}
    for module in model.modules():
        if module not in inside:
            module.to_empty(device=device, recurse=False)
    model.tie_weights()  # type: ignore[operator]
    _initialise(model, seed, _whole_one_by_one(layers, device, shards))
    if step.plan.checkpointing == "full":
        model.activation_checkpointing_enable()  # type: ignore[operator]
    if shards is not None:
        shards.root(model)
    return model.train()


def _whole_one_by_one(
    layers: Sequence[nn.Module], device: torch.device, shards: Shards | None
) -> Callable[[nn.Module | None], None]:
    """Called with each module before it is initialised, and with None after the last: a layer is
    allocated when its turn comes, and sharded when it is over.
    """
    open_layer: list[nn.Module] = []

    def entering(module: nn.Module | None) -> None:
        if shards is None or not (module is None or any(module is one for one in layers)):
            return
        if open_layer:
            shards.layer(open_layer.pop())
        if module is not None:
            module.to_empty(device=device)
            open_layer.append(module)

    return entering


def arranged(step: Step) -> nn.Module:
    """The model on meta, its targeted layers swapped and what the plan freezes frozen."""
    model = skeleton(step)
    for name, unit in step.placed:
        if unit.layer_half:
            _swap(model, name, unit, step)
        elif not unit.trained:
            model.get_parameter(name).requires_grad_(False)
    return model


def quiet_transformers() -> None:
    """Its advice and progress bars are about other uses than ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def skeleton(step: Step) -> nn.Module:
    """The plain transformers model of a step, on meta. Raises UsageError for a configuration that
    transformers refuses.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet_transformers()
    own = ("model_type", "dtype", "torch_dtype")
    values = {k: v for k, v in step.architecture.config.items() if k not in own}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = AutoConfig.for_model(
                step.architecture.model_type, **{**values, "use_cache": False}
            )
            # A padding id's embedding never trains, and ours has no padding: 0 is end-of-text here.
            config.pad_token_id = None
            with torch.device("meta"):
                model: nn.Module = AutoModelForCausalLM.from_config(
                    config,
                    dtype=DTYPES[step.plan.weight_dtype],
                    attn_implementation=ATTENTION[step.plan.attention],
                )
        except Exception as problem:  # of many kinds, as each field of a config has its own
            raise UsageError(
                f"transformers refuses the configuration of {step.architecture.name}: "
                f"{said(problem)}",
                "Correct its config.json.",
            ) from problem
    return model


def _swap(model: nn.Module, weight: str, unit: Unit, step: Step) -> None:
    path, _, name = weight.removesuffix(".weight").rpartition(".")
    parent = model.get_submodule(path)
    linear = getattr(parent, name)
    half = step.plan.halves.layer
    assert half is not None
    dtype, settings = DTYPES[step.plan.weight_dtype], step.plan.layer_settings
    matrix = dataclasses.replace(unit.matrix, name=weight, layer=layer_of(weight))
    setattr(parent, name, MethodLinear(half, matrix, settings, dtype, linear.bias))


@torch.no_grad()
def _initialise(model: Any, seed: int, entering: Callable[[nn.Module | None], None]) -> None:
    """transformers' own initialisation for its modules, the method's for its layers, each from
    the seed.
    """
    torch.manual_seed(seed)
    index = 0
    for module in model.modules():
        entering(module)
        if isinstance(module, MethodLinear):
            index += 1
            module.initialise(seed * 1_000_003 + index, _dense_start(model, module))
            if module.bias is not None:
                module.bias.zero_()
        else:
            model._init_weights(module)
    entering(None)


def _dense_start(model: Any, layer: MethodLinear) -> torch.Tensor | None:
    """The matrix the model would start from, for methods that keep one."""
    if not getattr(layer.layer_half, "STARTS_DENSE", False):
        return None
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
    model._init_weights(linear)
    return linear.weight


def trained_parameters(
    step: Step, model: nn.Module
) -> Iterator[tuple[tuple[nn.Parameter, ...], Trained]]:
    """What is trained together, with what the step says of it, in the step's order."""
    parameters = dict(model.named_parameters())
    for name, unit in step.placed:
        stem = name.removesuffix("weight")
        for trained in unit.trained:
            keys = [stem + t.name if unit.layer_half else name for t in trained.tensors]
            matrix = dataclasses.replace(
                trained.matrix,
                name=f"{name} {trained.matrix.name.partition(' ')[2]}",
                layer=layer_of(name),
            )
            placed = dataclasses.replace(trained, matrix=matrix)
            yield tuple(parameters[key] for key in keys), placed
