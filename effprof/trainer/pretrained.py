"""Start from a model that someone has trained: a Hugging Face folder of safetensors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effprof.architectures import architecture
from effprof.errors import EffprofError, UsageError
from effprof.plan import Plan
from effprof.trainer.build import quiet_transformers
from effprof.trainer.layer import MethodLinear


def check(folder: str, plan: Plan) -> None:
    """Raise UsageError for a folder that is no model, or not the plan's."""
    path = Path(folder)
    if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
        raise UsageError(
            f"--init-from {folder!r} holds no config.json with safetensors.",
            "Give a folder that save_pretrained wrote.",
        )
    given, wanted = architecture(folder), plan.architecture
    skipped = ("name", "config")
    for one in dataclasses.fields(wanted):
        ours, theirs = getattr(wanted, one.name), getattr(given, one.name)
        if one.name not in skipped and ours != theirs:
            raise UsageError(
                f"--model {plan.model} has {one.name} {ours}, --init-from {folder!r} {theirs}.",
                f"Type --model {folder}.",
            )


def tokenizer_of(folder: str) -> str:
    """The folder as a tokenizer's path: its weights know no other ids. Raises UsageError."""
    if not any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise UsageError(
            f"--init-from {folder!r} holds no tokenizer.", "Add --tokenizer with the model's own."
        )
    return folder


@torch.no_grad()
def load_pretrained(folder: str, model: nn.Module, seed: int) -> None:
    """Copy a folder's weights into a built model; a method's layers start from their matrices.

    Raises EffprofError where tensors are missing, UsageError where a method has no start from one.
    """
    source = _read(folder)
    own, theirs = dict(model.named_parameters()), dict(source.named_parameters())
    index = 0
    for path, module in model.named_modules():
        if isinstance(module, MethodLinear):
            index += 1
            dense = theirs.pop(f"{path}.weight").float()
            module.initialise(seed * 1_000_003 + index, dense.to(next(module.parameters()).device))
            for name in module.names:
                own.pop(f"{path}.{name}", None)
    for name, parameter in own.items():
        parameter.copy_(theirs[name])


def _read(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as problem:  # noqa: BLE001 - a damaged folder fails in many ways
        raise EffprofError(
            f"Cannot load {folder!r}: {type(problem).__name__}.", "Download the model again."
        ) from None
    if found["missing_keys"] or found["mismatched_keys"]:
        key = sorted(map(str, (*found["missing_keys"], *found["mismatched_keys"])))[0]
        raise EffprofError(f"{folder!r} lacks the tensor {key}.", "Download the model again.")
    return model
