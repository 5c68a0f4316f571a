"""A trained low-rank correction for others: an adapter in PEFT's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from effprof.files import write_folder
from effprof.plan import Plan
from effprof.trainer.layer import MethodLinear


def has_adapter(plan: Plan) -> bool:
    """Whether the run's change of its base is a correction of the targeted matrices alone."""
    return plan.freeze_rest and hasattr(plan.halves.layer, "adapter")


@torch.no_grad()
def export_adapter(model: nn.Module, plan: Plan, base: str, folder: Path) -> None:
    """Write ``adapter_config.json`` and the tensors that PEFT adds to ``base``.

    Raises EffprofError where the disk refuses.
    """
    half: Any = plan.halves.layer
    layers = {path: m for path, m in model.named_modules() if isinstance(m, MethodLinear)}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": sorted({path.rpartition(".")[2] for path in layers}),
        "inference_mode": True,
        "bias": "none",
        **half.adapter(plan.layer_settings),
    }
    tensors: dict[str, Tensor] = {
        f"base_model.model.{path}.lora_{name}.weight": layer.get_parameter(name).cpu().contiguous()
        for path, layer in layers.items()
        for name in ("A", "B")
    }

    def fill(temporary: Path) -> None:
        temporary.mkdir()
        (temporary / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})

    write_folder(folder, fill)
