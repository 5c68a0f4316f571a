"""Architectures: parameter counts against transformers' own, and configurations that cannot be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS
from samples import TINY

from effprof.architectures import _architecture, architecture, presets
from effprof.configuration import from_config
from effprof.errors import UsageError
from effprof.plan import Plan
from effprof.step import edited, work_out

PRESET_PARAMETERS = {  # shapes of the benchmark, counted by hand from its config files
    "9m": 8_995_968,
    "20m": 19_548_416,
    "35m": 35_197_824,
    "40m": 42_392_480,
    "60m": 58_073_600,
    "71m": 70_578_688,
    "100m": 100_117_120,
    "130m": 134_105_856,
    "250m": 247_370_496,
    "350m": 367_969_280,
    "1b": 1_339_082_752,
    "3b": 2_685_831_680,
    "7b": 6_738_415_616,
    "13b": 13_015_864_320,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
}


@pytest.mark.parametrize("name", PRESET_PARAMETERS)
def test_preset_parameters(name: str) -> None:
    assert architecture(name).parameters == PRESET_PARAMETERS[name]


def test_every_preset_is_checked() -> None:
    assert {config["name"] for config in presets().values()} == PRESET_PARAMETERS.keys()


def test_aliases_are_the_same_model() -> None:
    assert architecture("1b") == architecture("llama-1b") == architecture("LLAMA_1B")


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_equal_transformers(name: str, configs: dict[str, str]) -> None:
    from effprof.trainer.build import skeleton

    plan = Plan(model=configs[name], attention="eager", device="cpu")
    model = skeleton(work_out(plan))
    own = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert plan.architecture.parameters == sum(p.numel() for p in model.parameters())
    declared = {n: unit.tensors[0].shape for n, unit in work_out(plan).placed}
    assert declared == own


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size"])
@pytest.mark.parametrize("value", [None, "64", -1, 0, 2.5, True])
def test_bad_field_is_named(key: str, value: object) -> None:
    with pytest.raises(UsageError) as error:
        from_config({"model_type": "llama", **TINY, key: value}, "test")
    assert key in error.value.message


def test_null_is_refused_where_transformers_refuses_it() -> None:
    """And accepted where it means something: no soft cap, no window, as many heads as queries."""
    for model_type, key in (("mistral", "num_key_value_heads"), ("qwen3", "head_dim")):
        with pytest.raises(UsageError, match=key):
            from_config({"model_type": model_type, **TINY, key: None}, "x")
    assert (
        from_config({"model_type": "llama", **TINY, "num_key_value_heads": None}, "x").kv_heads == 4
    )
    gemma = {"model_type": "gemma2", **TINY, "attn_logit_softcapping": None}
    assert from_config(gemma, "x").attention_softcap is None
    mistral = {"model_type": "mistral", **TINY, "sliding_window": None, "num_key_value_heads": 2}
    assert from_config(mistral, "x").sliding_window is None


def test_what_transformers_or_torch_refuses_is_refused(tmp_path: Path) -> None:
    def path(**values: Any) -> str:
        (tmp_path / "it.json").write_text(json.dumps({**TINY, **values}))
        _architecture.cache_clear()
        return str(tmp_path / "it.json")

    odd = {"hidden_size": 40, "num_attention_heads": 3, "head_dim": 16}
    with pytest.raises(UsageError, match="not a multiple of num_attention_heads"):
        Plan(model=path(model_type="llama", **odd))
    assert Plan(model=path(model_type="mistral", num_key_value_heads=3, **odd))
    with pytest.raises(UsageError, match="attention sdpa"):
        Plan(model=path(model_type="gemma2", attn_logit_softcapping=None))
    with pytest.raises(UsageError, match="multiples of 8 in bf16"):
        Plan(model=path(model_type="mixtral", num_key_value_heads=2, intermediate_size=84))
    mixed = path(model_type="mixtral", num_key_value_heads=2, intermediate_size=84)
    assert Plan(model=mixed, dtype="fp32")
    with pytest.raises(UsageError, match="gelu_new"):
        Plan(model=path(model_type="llama", hidden_act="gelu_new"))


@pytest.mark.parametrize(("targets", "kept"), [(("attention",), "silu"), (("mlp",), "linear")])
def test_an_activation_goes_with_its_matrices(targets: tuple[str, ...], kept: str) -> None:
    """CoLA's own stands in for it where CoLA is."""
    assert edited(Plan(model="1b", method="cola", targets=targets)).activation == kept


def test_missing_kv_heads_follow_the_type() -> None:
    base = {**TINY, "num_attention_heads": 32, "hidden_size": 128}
    assert from_config({"model_type": "llama", **base}, "x").kv_heads == 32
    assert from_config({"model_type": "mistral", **base}, "x").kv_heads == 8


@pytest.mark.parametrize(
    ("content", "fragment"),
    [("{", "not valid JSON"), ("[]", "not a JSON object"), ('{"model_type": "t5"}', "'t5'")],
)
def test_bad_config_file(tmp_path: Path, content: str, fragment: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=fragment):
        architecture(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    "field",
    [
        {"rope_scaling": "x"},
        {"rope_theta": "abc"},
        {"rms_norm_eps": "a"},
        {"rms_norm_eps": 0},
        {"sliding_window": -1},
    ],
)
def test_a_field_of_another_kind(field: dict[str, object]) -> None:
    (key,) = field
    with pytest.raises(UsageError, match=key):
        from_config({"model_type": "llama", **TINY, **field}, "x")


def test_what_transformers_refuses_is_no_traceback() -> None:
    from effprof.step import work_out
    from effprof.trainer.build import skeleton

    config = {"model_type": "llama", **TINY, "rope_scaling": {"rope_type": "foo"}}
    step = work_out(Plan(model="9m"))
    shape = dataclasses.replace(from_config(config, "mine"), layers=step.architecture.layers)
    with pytest.raises(UsageError, match=r"transformers refuses the configuration of mine: .*foo"):
        skeleton(dataclasses.replace(step, architecture=shape))


def test_folder_is_as_good_as_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **TINY}))
    assert architecture(str(tmp_path)).hidden == 64


def test_unreadable_config(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Cannot read"):
        architecture(str(tmp_path / "missing.json"))


def test_both_names_of_the_number_of_experts() -> None:
    one = {"model_type": "qwen3_moe", **TINY, "moe_intermediate_size": 48, "num_experts_per_tok": 2}
    same = [from_config({**one, key: 4}, "x") for key in ("num_experts", "num_local_experts")]
    assert same[0].parameters == same[1].parameters
    with pytest.raises(UsageError, match="differ"):
        from_config({**one, "num_experts": 4, "num_local_experts": 8}, "x")


@pytest.mark.parametrize(
    "changes", [{"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}, {"num_experts": 1}]
)
def test_experts_in_some_layers_only_are_refused(changes: dict[str, object]) -> None:
    one = {"model_type": "qwen3_moe", **TINY, "num_experts": 4, "num_experts_per_tok": 1}
    with pytest.raises(UsageError, match="without experts"):
        from_config({**one, **changes}, "x")


def test_experts_alone_are_no_target(configs: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="--targets mlp"):
        Plan(model=configs["mixtral"], method="lowrank", targets=("mlp",))
