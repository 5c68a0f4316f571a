"""The measurement store: what goes in comes out, whoever writes beside it and what is killed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers import run_cli

from effprof import calibration
from effprof.errors import EffprofError
from effprof.measure import store
from effprof.prober.compare import compare
from effprof.prober.records import replay

RECORDING = Path(__file__).parent / "data" / "probe_9m_galore_cpu.jsonl"


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFPROF_HOME", str(tmp_path / "home"))


def document(**device: Any) -> dict[str, Any]:
    found = json.loads(json.dumps(compare(replay(RECORDING), calibrated=False).as_dict()))
    found["device"] |= device
    return found


def gpu(context: int, *, torch: str = "2.13.0", driver: str = "580", card: str = "t4") -> Any:
    found = document(card=card, driver=driver)
    found["versions"]["torch"] = torch
    found["measured"]["memory"]["context"] = context
    found["measured"] |= {"process_meter": "NVML, this process", "workspace": 8_519_680}
    return found


def test_round_trip() -> None:
    given = document()
    number = store.add(given)
    assert store.one(number) == given
    (row,) = store.table().to_dict("records")
    assert row["peak_allocated"] == given["measured"]["memory"]["peak_allocated"]
    assert row["step_seconds"] == given["measured"]["step_seconds"]["median"]
    assert row["tokens_per_second"] == 1024 / row["step_seconds"]


def test_a_recording_counts_once() -> None:
    for _ in range(2):
        assert run_cli("probe", "--replay", RECORDING, "--store")[0] == 0
    assert store.count() == 1


def test_list_show_and_export(tmp_path: Path) -> None:
    assert run_cli("probe", "--replay", RECORDING, "--store")[0] == 0
    code, out, _ = run_cli("probe", "--list")
    assert code == 0
    assert "galore r32" in out
    assert max(map(len, out.splitlines())) <= 100
    listed = json.loads(run_cli("probe", "--list", "--json")[1])
    assert listed["measurements"][0]["model"] == "9m"
    shown = json.loads(run_cli("probe", "--show", "1")[1])
    assert shown["schema"] == "effprof.probe/1"
    table = pd.read_csv(io.StringIO(run_cli("probe", "--export", "csv")[1]))
    path = tmp_path / "m.parquet"
    assert run_cli("probe", "--export", "parquet", "--out", path)[0] == 0
    again = pd.read_parquet(path)
    assert list(table.columns) == list(again.columns) == store.COLUMNS
    assert table["peak_allocated"].tolist() == again["peak_allocated"].tolist()


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("--show", "9"), "--list"),
        (("--export", "xlsx"), "csv"),
        (("--export", "parquet"), "--out"),
        (("--list", "--show", "1"), "Leave --show out"),
        (("--list", "--model", "9m"), "--model"),
        (("--model", "9m", "--out", "x"), "--export"),
        (("--model", "9m", "--max-memory", "1GB"), "--find"),
        (("--model", "9m", "--find", "batch"), "max-batch"),
        (("--model", "9m", "--interval", "0.001"), "0.02"),
        (("--model", "9m", "--margin", "nan"), "0.05"),
        (("--model", "9m", "--margin", "-1"), "0.05"),
        (("--replay", "x", "--seconds", "3"), "--seconds"),
        (("--replay", "x", "--record", "y"), "--record"),
        (("--list", "--tape"), "--tape"),
        (("--model", "9m", "--find", "max-batch", "--seconds", "1"), "--seconds"),
        (("--export", ""), "csv"),
        (("--export", "csv", "--json"), "--json"),
        (("--show", "99999999999999999999"), "--list"),
    ],
)
def test_usage(arguments: tuple[str, ...], hint: str) -> None:
    code, out, err = run_cli("probe", *arguments)
    assert (code, out) == (2, "")
    assert hint in err


def test_constants_are_medians_under_the_newest_driver_and_torch() -> None:
    for context in (100, 900):
        store.add(gpu(context, torch="2.12.0"))
    for context in (300, 310, 500):
        store.add(gpu(context))
    store.add(gpu(7, card="a10"))
    found = calibration.of("t4")
    assert found is not None
    assert (found.context, found.probes, found.torch) == (310, 3, "2.13.0")
    assert calibration.of("l4") is None
    growth = gpu(10_000)
    growth["measured"]["process_meter"] = "growth of the device's memory"
    store.add(growth)  # other processes may be in it
    again = calibration.of("t4")
    assert again is not None
    assert again.context == 310


ROW = '{"schema": "effprof.calibration/1", "cards": {"t4": {"probes": 1, "date": "x", %s}}}'


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", '{"schema": "x"}', '{"schema": 1, "cards": 2}', "\udcff"),
        *(ROW % one for one in ('"context": "x"', '"context": -1', '"efficiency": 3')),
        ROW % '"efficiency": {"matmul_bf16": 0.0}',
        ROW % '"efficiency": {"matmul_bf16": 1e999}',
    ],
)
def test_a_damaged_calibration_is_none(text: str) -> None:
    calibration.path().parent.mkdir(parents=True)
    calibration.path().write_text(text, encoding="utf-8", errors="surrogateescape")
    assert calibration.of("t4") is None
    store.add(gpu(300))
    assert calibration.of("t4") is not None


def test_a_damaged_store_is_said_and_the_probe_still_shown(tiny: str) -> None:
    store.path().parent.mkdir(parents=True)
    store.path().write_bytes(b"this is no database, it is some text" * 100)
    with pytest.raises(EffprofError, match="cannot be used"):
        store.table()
    code, out, err = run_cli("probe", "--replay", RECORDING, "--store")
    assert code == 0
    assert "peak allocated" in out
    assert "not kept" in err
    assert "cannot be used" in json.loads(run_cli("doctor", "--json")[1])["store"]["problem"]


def test_a_newer_layout_is_left_alone() -> None:
    store.add(document())
    import sqlite3

    with sqlite3.connect(store.path()) as connection:
        connection.execute("pragma user_version = 99")
    connection.close()
    with pytest.raises(EffprofError, match="newer effprof"):
        store.add(document())


WRITER = """
import json, sys
from effprof.measure import store
document = json.load(open(sys.argv[1]))
print("ready", flush=True)
for number in range(int(sys.argv[2])):
    store.add(document)
    print(number, flush=True)
"""


def writer(path: Path, times: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(times)],
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )


def test_concurrent_writers_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "document.json"
    path.write_text(json.dumps(gpu(5)), encoding="utf-8")
    writers = [writer(path, 10) for _ in range(4)]
    for one in writers:
        one.communicate()
        assert one.returncode == 0
    assert store.count() == 40
    assert store.table()["id"].is_unique


def test_kill_9_leaves_the_store_whole(tmp_path: Path) -> None:
    """What was said to be kept is there, and the next writer goes on."""
    path = tmp_path / "document.json"
    path.write_text(json.dumps(gpu(5)), encoding="utf-8")
    kept = 0
    for delay in (0.0, 0.01, 0.03, 0.05, 0.08):
        one = writer(path, 1000)
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
        one.stdout.readline()
        time.sleep(delay)
        one.send_signal(signal.SIGKILL)
        kept += 1 + len(one.communicate()[0].splitlines())
        assert kept <= store.count() <= kept + 1
        kept = store.count()
        store.add(gpu(6))
        kept += 1
    assert store.count() == kept
