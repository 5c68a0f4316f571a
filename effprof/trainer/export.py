"""A trained model for others: a Hugging Face folder with dense matrices, and the native form for
effprof.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effprof.architectures import presets
from effprof.errors import EffprofError
from effprof.files import write_folder
from effprof.plan import Plan, from_dict
from effprof.step import work_out
from effprof.trainer import checkpoint
from effprof.trainer.build import build_model, quiet_transformers, skeleton
from effprof.trainer.folder import read_tables
from effprof.trainer.layer import MethodLinear


@torch.no_grad()
def export(
    model: nn.Module, tokenizer: Any, plan: Plan, folder: Path, card: str | None = None
) -> Path:
    """Write ``config.json``, safetensors and the tokenizer so that AutoModelForCausalLM opens them.

    Factorised layers are written dense; ``card`` becomes README.md. Raises EffprofError where a
    method has no dense form or the disk refuses.
    """
    quiet_transformers()
    dense = _dense_model(model, plan)
    if tokenizer is not None:
        dense.config.eos_token_id = tokenizer.eos_token_id
        dense.config.bos_token_id = dense.config.pad_token_id = None
        dense.generation_config.eos_token_id = tokenizer.eos_token_id
        dense.generation_config.bos_token_id = dense.generation_config.pad_token_id = None

    def fill(temporary: Path) -> None:
        dense.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")

    write_folder(folder, fill)
    return folder


def has_dense_form(model: nn.Module) -> bool:
    """Whether every layer multiplies by some matrix, so that a Hugging Face folder can hold it."""
    first = next((m for m in model.modules() if isinstance(m, MethodLinear)), None)
    return first is None or first.dense() is not None


def _dense_model(model: nn.Module, plan: Plan) -> Any:
    """A plain transformers model on the CPU with the trained weights."""
    dense: Any = skeleton(work_out(plan)).to_empty(device="cpu")
    dense.tie_weights()
    for module in dense.modules():  # buffers that no checkpoint holds
        dense._init_weights(module)
    own: dict[str, Tensor] = dict(model.named_parameters())
    for path, module in model.named_modules():
        if isinstance(module, MethodLinear):
            weight = module.dense()
            if weight is None:
                raise EffprofError(
                    f"{plan.method} has no dense form, so a Hugging Face folder cannot hold it.",
                    "Open the run with effprof.load(folder).",
                )
            own[f"{path}.weight"] = weight.cpu()
    for name, parameter in dense.named_parameters():
        parameter.copy_(own[name])
    return dense


def load(folder: str | Path, device: str = "cpu") -> nn.Module:
    """The model of a run folder in the method's own form, from its newest good checkpoint, in
    evaluation mode.

    Raises EffprofError where the folder is no run or holds no checkpoint.
    """
    run = Path(folder)
    if not (run / "run.toml").is_file():
        raise EffprofError(f"{str(run)!r} is not a run folder.", "Give the --out folder of a run.")
    values = read_tables(run / "run.toml")["plan"]
    found = checkpoint.newest(run)
    if found is None:
        raise EffprofError(f"{str(run)!r} holds no checkpoint.", "Train for longer.")
    if values["model"] not in presets():  # the run carries its own copy of a config.json
        values["model"] = str(run / "config.json")
    model = build_model(work_out(from_dict(values)), torch.device(device), seed=0)
    checkpoint.restore(*found, model, None)
    return model.eval()
