"""Shared fixtures: a home of their own, one tiny model per architecture type, quiet children."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import samples
from hypothesis import settings

os.environ.setdefault("KINETO_LOG_LEVEL", "99")
if "PYTEST_XDIST_WORKER" in os.environ:  # one worker per core: each needs no more than one
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["EFFPROF_QUIET"] = "1"
os.environ["COLUMNS"] = "100"
os.environ["HF_HUB_OFFLINE"] = "1"

settings.register_profile("repeatable", derandomize=True)  # the gate's answer is the same twice
settings.load_profile("repeatable")

CONFIGS = {
    "llama": {},
    "llama-biased": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "mistral": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 24},
    "mistral-odd": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "gemma": {"num_key_value_heads": 1, "head_dim": 32},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 32, "query_pre_attn_scalar": 32},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "head_dim": 24,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
}


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tokenizers and tokens of the tests stay in a folder of the tests."""
    os.environ["EFFPROF_HOME"] = str(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of a tiny config.json per architecture."""
    made = {}
    for name, extra in CONFIGS.items():
        folder = tmp_path_factory.mktemp("configs") / name
        folder.mkdir()
        document = {"model_type": name.partition("-")[0], **samples.TINY, **extra}
        (folder / "config.json").write_text(json.dumps(document))
        made[name] = str(folder / "config.json")
    return made


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libnvidia-ml.so.1 compiled from tests/fake_nvml.c."""
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).with_name("fake_nvml.c")
    library = folder / "libnvidia-ml.so.1"
    command = ["gcc", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", str(library)]
    subprocess.run([*command, str(source)], check=True)
    return folder


@pytest.fixture(scope="session")
def tiny(configs: dict[str, str]) -> str:
    """A tiny llama."""
    return configs["llama"]


@pytest.fixture(scope="session")
def printed(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> tuple[Path, dict[str, Any]]:
    """A folder of what commands left behind, and every document they printed, by schema."""
    folder = tmp_path_factory.mktemp("printed") / "made"
    return folder, samples.make(folder, texts)


@pytest.fixture(scope="session")
def documents(printed: tuple[Path, dict[str, Any]]) -> dict[str, list[str]]:
    """What `effprof report` takes, by kind: runs, documents, a recording, a snapshot."""
    folder, _ = printed
    kinds = ("estimate", "compare", "trace", "probe", "validate", "recommend")
    found = {kind: [str(folder / f"{kind}.json")] for kind in kinds}
    found |= {"recording": [str(samples.RECORDING)], "snapshot": [str(folder / "s.pickle")]}
    runs = [str(folder / "one"), str(folder / "other")]
    found["bench"] = [str(samples.bench(folder / "study"))]
    return found | {"train": runs[:1], "runs": runs}


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder of real text, enough for both splits at 32 positions."""
    return samples.texts(tmp_path_factory.mktemp("texts"))
