"""NVML through the real binding, over a shared library built here that answers as scripted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from effprof.errors import EffprofError
from effprof.measure.nvml import Device, Reading
from effprof.measure.process import BY_APPEARANCE, BY_GROWTH, BY_PID, own
from effprof.measure.visible import device_of, first, visible

ASK = """
import json, dataclasses
from effprof.measure import nvml
with nvml.session() as session:
    if isinstance(session, nvml.Driver):
        found = {"driver": dataclasses.asdict(session)}
    else:
        devices = session.devices()
        found = {
            "driver": dataclasses.asdict(session.driver()),
            "devices": [dataclasses.asdict(one) for one in devices],
            "readings": [dataclasses.asdict(session.read(one.uuid)) for one in devices],
        }
print(json.dumps(found))
"""


def ask(library: Path, **script: str) -> dict[str, Any]:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library), **script}
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_one_gpu(nvml_library: Path) -> None:
    found = ask(nvml_library, NVML_PID="4242", NVML_THROTTLES="69")
    assert found["driver"] == {"version": "580.65.06", "cuda": "13.0", "problem": None}
    assert found["devices"] == [
        {
            "index": 0,
            "uuid": "GPU-aaaa",
            "name": "NVIDIA A100-SXM4-80GB",
            "total": 85_899_345_920,
            "parent": None,
            "place": None,
            "mig": False,
            "bus": "00000000:07:00.0",
            "capability": 8.0,
            "power_limit": 400.0,
            "virtual": None,
            "reasons": {},
        }
    ]
    assert found["readings"] == [
        {
            "total": 85_899_345_920,
            "used": 3_000_000_000,
            "free": 82_899_345_920,
            "processes": {"4242": 1_234_567_168},
            "utilisation": 97,
            "power": 250.0,
            "energy": 1000.0,
            "clock": 1410,
            "memory_clock": 1410,
            "temperature": 60,
            "throttles": ["power cap", "thermal (hardware)"],
            "reasons": {},
        }
    ]


FIELDS = {
    "UTILISATION": "utilisation",
    "POWER": "power",
    "ENERGY": "energy",
    "CLOCK": "clock",
    "MEMORY_CLOCK": "memory_clock",
    "TEMPERATURE": "temperature",
    "THROTTLES": "throttles",
    "PROCESS": "processes",
    "TOTAL": "memory",
}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(("code", "why"), [("3", "Not Supported"), ("15", "GPU is lost")])
def test_what_a_driver_does_not_say_is_none_with_the_reason(
    field: str, code: str, why: str, nvml_library: Path
) -> None:
    found = ask(nvml_library, **{f"NVML_{field}": f"!{code}", "NVML_PID": "1"})
    (reading,) = found["readings"]
    name = FIELDS[field]
    assert reading[name if name != "memory" else "used"] is None
    assert reading["reasons"] == {name: why}


def test_no_memory_per_process(nvml_library: Path) -> None:
    (reading,) = ask(nvml_library, NVML_PROCESS="0", NVML_PID="7")["readings"]
    assert reading["processes"] == {"7": None}
    assert "WSL" in reading["reasons"]["processes"]


def test_a_lost_gpu_does_not_hide_the_others(nvml_library: Path) -> None:
    found = ask(nvml_library, NVML_COUNT="3", NVML_1_HANDLE="!15")
    assert [one["uuid"] for one in found["devices"]] == ["GPU-aaaa", "GPU-cccc"]


def test_mig_instances_follow_their_gpu(nvml_library: Path) -> None:
    found = ask(nvml_library, NVML_COUNT="2", NVML_1_MIG="2", NVML_1M1_TOTAL="10468982784")
    rows = [(one["uuid"], one["parent"], one["mig"]) for one in found["devices"]]
    assert rows == [
        ("GPU-aaaa", None, False),
        ("GPU-bbbb", None, True),
        ("MIG-10", "GPU-bbbb", False),
        ("MIG-11", "GPU-bbbb", False),
    ]
    assert found["devices"][3]["total"] == found["readings"][3]["total"] == 10_468_982_784


@pytest.mark.parametrize(
    ("code", "said"),
    [("9", "not loaded"), ("18", "reboot"), ("4", "permission"), ("15", "lost"), ("999", "Error")],
)
def test_an_unusable_driver_says_why(code: str, said: str, nvml_library: Path) -> None:
    found = ask(nvml_library, NVML_INIT=f"!{code}")
    assert said in found["driver"]["problem"]
    assert "devices" not in found


def test_no_library() -> None:
    if Path("/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1").exists():
        pytest.skip("this machine has a driver")
    environment = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=True
    )
    assert "libnvidia-ml" in json.loads(done.stdout)["driver"]["problem"]


def device(index: int, uuid: str, name: str = "A", **more: Any) -> Device:
    return Device(index, uuid, name, 80 * 2**30, **more)


WHOLE = (device(0, "GPU-1a"), device(1, "GPU-1b"), device(2, "GPU-2c"))
SPLIT = (
    device(0, "GPU-1a"),
    device(1, "GPU-1b", mig=True),
    device(1, "MIG-x", parent="GPU-1b", place=(1, 0)),
    device(1, "MIG-y", parent="GPU-1b", place=(2, 0)),
)
CASES = [
    (WHOLE, None, ["GPU-1a", "GPU-1b", "GPU-2c"], ""),
    (WHOLE, "2,0", ["GPU-2c", "GPU-1a"], ""),
    (WHOLE, "", [], ""),
    (WHOLE, "-1", [], ""),
    (WHOLE, "0,-1,1", ["GPU-1a"], ""),
    (WHOLE, "0,7,1", ["GPU-1a"], "ends at '7'"),
    (WHOLE, "0,0", [], "twice"),
    (WHOLE, "GPU-2", ["GPU-2c"], ""),
    (WHOLE, "GPU-1", [], "more than one"),
    (WHOLE, "GPU-9", [], "no such"),
    (WHOLE, "one", [], "neither"),
    (SPLIT, None, ["GPU-1a"], ""),
    (SPLIT, "1", ["MIG-x"], "one MIG"),
    (SPLIT, "MIG-y", ["MIG-y"], "one MIG"),
    (SPLIT, "MIG-GPU-1b/2/0", ["MIG-y"], "one MIG"),
    (SPLIT, "MIG-GPU-1b/9/0", [], "no such MIG"),
    (SPLIT[1:], None, ["MIG-x"], "name it"),
    (SPLIT[1:2], "0", [], "no instance"),
]


@pytest.mark.parametrize(("devices", "asked", "uuids", "note"), CASES)
def test_cuda_visible_devices(
    devices: tuple[Device, ...], asked: str | None, uuids: list[str], note: str
) -> None:
    found = visible(devices, {} if asked is None else {"CUDA_VISIBLE_DEVICES": asked})
    assert [one.uuid for one in found.devices] == uuids
    assert note in found.note
    assert bool(note) == bool(found.note)


def test_gpus_that_differ_are_counted_fastest_first() -> None:
    devices = (device(0, "GPU-1a", "RTX 3090"), device(1, "GPU-1b", "A100"))
    assert "PCI_BUS_ID" in visible(devices, {"CUDA_VISIBLE_DEVICES": "1"}).note
    assert "PCI_BUS_ID" in visible(devices, {}).note
    ordered = {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert visible(devices, ordered).note == ""
    assert visible(devices, {"CUDA_VISIBLE_DEVICES": "GPU-1b"}).note == ""


def test_the_first_gpu_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = (device(0, "GPU-1a", "RTX 3090"), device(1, "GPU-1b", "A100"))
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    assert first(()) is None
    assert first(devices[:1]) == devices[0]
    assert first(WHOLE) == WHOLE[0]
    with pytest.raises(EffprofError, match="fastest first"):
        first(devices)
    for index in "01":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", index)
        with pytest.raises(EffprofError, match="fastest first"):
            first(devices)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1b")
    assert first(devices) == devices[1]


def test_the_device_behind_torchs_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device_of("1b", WHOLE) == WHOLE[1]
    assert device_of("GPU-1b", WHOLE) == WHOLE[1]
    assert device_of("zz", WHOLE) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-y")
    assert device_of("y", SPLIT) == SPLIT[3]
    assert device_of("1b", SPLIT) == SPLIT[3]  # some drivers give the GPU's UUID for an instance


def test_which_process_is_this_one() -> None:
    before = Reading(used=100, processes={5: 10})
    listed = own(before, Reading(used=400, processes={5: 10, 77: 300}), 77)
    assert listed is not None
    assert (listed.pid, listed.meter) == (77, BY_PID)
    appeared = own(before, Reading(used=400, processes={5: 10, 9001: 300}), 77)
    assert appeared is not None
    assert (appeared.pid, appeared.meter) == (9001, BY_APPEARANCE)
    two = own(before, Reading(used=400, processes={5: 10, 9001: 300, 9002: 1}), 77)
    assert two is not None
    assert (two.meter, two.memory(Reading(used=450))) == (BY_GROWTH, 350)
    hidden = own(Reading(used=100), Reading(used=400, processes={77: None}), 77)
    assert hidden is not None
    assert hidden.meter == BY_GROWTH
    assert own(Reading(), Reading(), 77) is None
