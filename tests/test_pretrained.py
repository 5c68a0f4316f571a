"""Going on from a model that someone has trained, and giving back what others open."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_cli

from effprof.plan import Plan
from effprof.trainer.build import build
from effprof.trainer.corpus import corpus
from effprof.trainer.pretrained import load_pretrained
from effprof.trainer.tokenizer import tokenizer

SMALL = ("--micro-batch", "2", "--seq-len", "32", "--dtype", "fp32", "--device", "cpu")
STARTS = ("full", "lora", "relora", "galore", "fira", "apollo", "q-galore", "golore", "badam")


@pytest.fixture(scope="module")
def base(configs: dict[str, str], texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained qwen2 (biased, tied) with its tokenizer, as transformers writes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(configs["qwen2"]))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    model.save_pretrained(folder)
    tokenizer(corpus(str(texts)), 1024, None).save_pretrained(folder)
    return folder


def train(base: Path, texts: Path, out: Path, *more: str) -> tuple[int, str, str]:
    return run_cli(
        *("train", "--init-from", base, "--data", texts, "--out", out, "--warmup", "0"),
        *(*SMALL, *more),
    )


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", STARTS)
def test_it_starts_as_the_pretrained_model(method: str, base: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, _ = build(Plan(model=str(base), method=method, dtype="fp32", device="cpu"))
    ids = torch.randint(0, 1024, (2, 16))
    expected = logits(AutoModelForCausalLM.from_pretrained(base), ids)
    assert not torch.allclose(logits(model, ids), expected, atol=1e-2)
    load_pretrained(str(base), model, seed=0)
    close = 0.2 if method == "q-galore" else 1e-5  # whose weights are 8-bit integers
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=close)


def test_an_adapter_opens_in_peft(base: Path, texts: Path, tmp_path: Path) -> None:
    """On its base it is the exported model; trained, resumed without the base's folder."""
    import peft
    from transformers import AutoModelForCausalLM

    out = tmp_path / "run"
    more = ("--method", "lora", "--rank", "8", "--freeze-rest", "--steps", "6", "--lr", "1e-2")
    code, _, err = train(base, texts, out, *more)
    assert code == 0, err
    ids = torch.randint(0, 1024, (2, 16))
    original = AutoModelForCausalLM.from_pretrained(base)
    before = logits(original, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers by an older name
        adapted = peft.PeftModel.from_pretrained(original, out / "adapter")
    exported = logits(AutoModelForCausalLM.from_pretrained(out / "model"), ids)
    torch.testing.assert_close(logits(adapted, ids), exported, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, exported, atol=1e-3)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 8
    assert config["base_model_name_or_path"] == str(base)


def test_a_resumed_run_keeps_what_it_learnt(base: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = ("--method", "galore", "--steps", "6", "--save-every", "3")
    assert train(base, texts, out, *more)[0] == 0
    whole = (out / "metrics.jsonl").read_text().splitlines()
    (out / "checkpoint-00000006" / "state.json").write_text("{")
    code, _, err = train(base, texts, out, *more, "--resume")
    assert code == 0, err
    again = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(r)["loss"] for r in again] == [json.loads(r)["loss"] for r in whole]


def test_what_cannot_be_started_from(base: Path, texts: Path, tiny: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    out = tmp_path / "run"
    for flags, fragment in (
        (("--model", tiny), "--init-from"),
        (("--method", "cola"), "dense"),
    ):
        code, _, err = train(base, texts, out, "--steps", "2", *flags)
        assert (code, fragment in err) == (2, True), err
    bad = tmp_path / "bad"
    bad.mkdir()
    code, _, err = train(bad, texts, out, "--steps", "2", "--model", tiny)
    assert (code, "safetensors" in err) == (2, True)
    (bad / "config.json").write_text((base / "config.json").read_text())
    tensors = load_file(base / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    code, _, err = train(bad, texts, out, "--steps", "2")
    assert (code, "tokenizer" in err) == (2, True)
    code, _, err = train(bad, texts, out, "--steps", "2", "--tokenizer", str(base))
    assert (code, "lacks the tensor" in err) == (1, True)
