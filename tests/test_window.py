"""Windows and samplers: absolute schedules, what a window says, readings through NVML."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from effprof.errors import UsageError
from effprof.measure.nvml import Reading
from effprof.measure.sampler import HostSource, Sampler
from effprof.measure.window import Window, summarised


class Slow:
    """A source whose third reading takes six intervals."""

    def __init__(self) -> None:
        self.calls = 0

    def read(self) -> Reading:
        self.calls += 1
        if self.calls == 3:
            time.sleep(0.12)
        return Reading(used=self.calls)


def test_samples_keep_to_the_schedule() -> None:
    with Sampler(Slow(), 0.02) as sampler:
        time.sleep(0.4)
    times = [at for at, _ in sampler.samples[1:-1]]
    late = [at % 0.02 for at in times]
    assert sampler.late >= 5
    assert len(times) <= 20
    # No drift: after the late one, samples are at multiples of the interval again.
    assert sorted(min(one, 0.02 - one) for one in late)[len(late) // 2] < 0.005


@pytest.mark.parametrize("interval", [0.0, 0.004, -1.0, 11.0, float("nan")])
def test_an_interval_that_cannot_be(interval: float) -> None:
    with pytest.raises(UsageError, match="5 ms"):
        Sampler(HostSource(), interval)


def test_the_thread_ends_with_its_window() -> None:
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), Window(torch.device("cpu"), HostSource()):
        _ = 1 / 0
    assert threading.active_count() == before


def test_the_cpus_twin_sees_memory_that_came_and_went() -> None:
    # New pages: an allocation may find free ones of this process.
    with (
        Window(torch.device("cpu"), HostSource(), interval=0.005) as window,
        mmap.mmap(-1, 300 * 2**20) as held,
    ):
        held.write(b"1" * len(held))
        time.sleep(0.05)
    found = window.measurement
    assert found.used is not None
    assert found.used - int(HostSource().read().used or 0) > 250 * 2**20
    assert found.seconds >= 0.05
    assert found.samples >= 5


def test_a_window_of_readings() -> None:
    readings = [
        Reading(
            used=100 + step,
            processes={7: 50 - step, 8: 1},
            power=200.0 + 10 * step,
            energy=1000.0 + 4 * step,
            clock=1400 - step,
            temperature=60 + step,
            utilisation=90 + step,
            throttles=("power cap",) if step == 2 else (),
        )
        for step in range(4)
    ]
    found = summarised(2.0, list(enumerate(readings)), 7, allocated=5, reserved=6)
    assert found.as_dict() == {
        "seconds": 2.0,
        "allocated": 5,
        "reserved": 6,
        "used": 103,
        "process": 50,
        "energy": 12.0,
        "power": 215.0,
        "utilisation": 92,
        "clock": 1397,
        "temperature": 63,
        "throttles": ["power cap"],
        "samples": 4,
        "late": 0,
        "reasons": {},
    }


def test_an_energy_counter_that_stands_still_or_wraps_is_none() -> None:
    for energies in ((5.0, 5.0), (9.0, 1.0)):
        found = summarised(1.0, [(0.0, Reading(energy=one)) for one in energies])
        assert found.energy is None
        assert found.power is None
        assert "energy" in found.reasons


SAMPLED = """
import json, time, torch
from effprof.measure import nvml
from effprof.measure.sampler import GpuSource
from effprof.measure.window import Window
with nvml.session() as session:
    source = GpuSource(session, "GPU-aaaa")
    with Window(torch.device("cpu"), source, 42, 0.005) as window:
        time.sleep(0.1)
print(json.dumps(window.measurement.as_dict()))
"""


def sampled(library: Path, **script: str) -> dict[str, Any]:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library), "NVML_PID": "42", **script}
    done = subprocess.run(
        [sys.executable, "-c", SAMPLED], env=environment, capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout))


def test_a_window_over_nvml(nvml_library: Path) -> None:
    found = sampled(
        nvml_library,
        NVML_PROCESS="100,200,900,300",
        NVML_ENERGY="1000,3000,8000",
        NVML_TEMPERATURE="50,71,60",
        NVML_POWER="!3",
    )
    assert found["process"] == 900
    assert found["energy"] == 7.0
    assert found["temperature"] == 71
    assert found["power"] == pytest.approx(7.0 / found["seconds"])
    assert found["reasons"] == {"power": "Not Supported"}
    assert found["samples"] >= 10


def test_a_gpu_lost_in_a_window_leaves_what_was_sampled(nvml_library: Path) -> None:
    found = sampled(nvml_library, NVML_USED="1000,2000,3000,4000,!15", NVML_PROCESS="5,6,!15")
    assert found["used"] == 4000
    assert found["process"] == 6
    assert found["reasons"]["memory"] == "GPU is lost"
