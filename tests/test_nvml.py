"""NVML through the real binding, over a shared library built here that answers as scripted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ASK = """
import json, os, sys, dataclasses
from effprof.measure import nvml
pid = int(os.environ["FAKE_PID"])
print(json.dumps([dataclasses.asdict(r) for r in nvml.read(os.environ.get("ASK_UUID"), pid)]))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """libnvidia-ml.so.1, compiled from tests/fake_nvml.c."""
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).with_name("fake_nvml.c")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", str(folder / "libnvidia-ml.so.1"), str(source)],
        check=True,
    )
    return folder


def ask(library: Path, **script: str) -> list[dict[str, Any]]:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library), "FAKE_PID": "4242", **script}
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_one_gpu(library: Path) -> None:
    (reading,) = ask(library)
    assert reading == {
        "uuid": "GPU-aaaa",
        "name": "NVIDIA A100-SXM4-80GB",
        "total": 85_899_345_920,
        "used": 3_000_000_000,
        "process": 1_234_567_168,
        "driver": "580.65.06",
        "reasons": [],
    }


def test_the_gpu_of_a_uuid(library: Path) -> None:
    for uuid in ("GPU-bbbb", "bbbb"):  # torch leaves the prefix out
        (reading,) = ask(library, FAKE_COUNT="3", ASK_UUID=uuid)
        assert reading["uuid"] == "GPU-bbbb"


def test_per_process_memory_not_available(library: Path) -> None:
    (reading,) = ask(library, FAKE_NO_USED="1")
    assert reading["process"] is None
    assert "WSL" in reading["reasons"][0]


def test_process_list_not_supported(library: Path) -> None:
    (reading,) = ask(library, FAKE_PROCESSES="3")
    assert reading["process"] is None
    assert "Not Supported" in reading["reasons"][0]


def test_a_lost_gpu_does_not_hide_the_others(library: Path) -> None:
    found = ask(library, FAKE_COUNT="3", FAKE_LOST="1")
    assert [reading["uuid"] for reading in found] == ["GPU-aaaa", "GPU-cccc"]


@pytest.mark.parametrize("code", ["9", "18", "999"])  # driver not loaded, version mismatch, unknown
def test_an_unusable_driver_is_no_gpu(code: str, library: Path) -> None:
    assert ask(library, FAKE_INIT=code) == []


def test_no_library_is_no_gpu() -> None:
    if Path("/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1").exists():
        pytest.skip("this machine has a driver")
    environment = {**os.environ, "FAKE_PID": "1"}
    environment.pop("LD_LIBRARY_PATH", None)
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == []
