"""The measurement store: every probe in one SQLite file, and the constants that estimates take from
it.

SQLite's own rollback journal keeps it whole under kill -9; writers wait for each other.
"""

from __future__ import annotations

import json
import sqlite3
import statistics
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from effprof import calibration
from effprof.calibration import Calibration
from effprof.errors import EffprofError, UsageError
from effprof.files import home, write_whole

_VERSION = 1
_WAIT = 60.0  # seconds a writer waits for the others
_TABLE = """create table if not exists measurements (
  id integer primary key autoincrement, taken text not null, device text not null, card text,
  driver text, torch text, effprof text, model text not null, method text not null,
  outcome text not null, document text not null)"""
_NEWEST = 20  # probes of a card that its constants are taken from


def path() -> Path:
    """The store's file."""
    return home() / "measurements.sqlite"


@contextmanager
def _open(file: Path) -> Iterator[sqlite3.Connection]:
    """The store, made where it is missing. Raises EffprofError where it cannot be used."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(file, timeout=_WAIT, isolation_level=None)) as connection:
            version = connection.execute("pragma user_version").fetchone()[0]
            if version > _VERSION:
                raise EffprofError(
                    f"{str(file)!r} was written by a newer effprof (layout {version}).",
                    "Upgrade effprof, or move the file away.",
                )
            if version < _VERSION:
                connection.execute("begin immediate")
                connection.execute(_TABLE)
                connection.execute(f"pragma user_version = {_VERSION}")
                connection.execute("commit")
            yield connection
    except sqlite3.DatabaseError as problem:
        raise EffprofError(
            f"The measurement store {str(file)!r} cannot be used: {problem}.",
            "Move it away (nothing else needs it), or set EFFPROF_HOME to another folder.",
        ) from None
    except OSError as problem:
        raise EffprofError(
            f"The measurement store {str(file)!r} cannot be used: {problem.strerror}.",
            "Set EFFPROF_HOME to a folder that can be written.",
        ) from None


def add(document: Mapping[str, Any], *, once: bool = False) -> int:
    """Keep a measurement (the document that ``probe --json`` prints); returns its number.

    ``once``: a recording that is kept already is no second measurement.

    Constants of its card are renewed in the same transaction. Raises EffprofError.
    """
    device, versions, plan = document["device"], document["versions"], document["plan"]
    row = (
        document["taken"],
        device.get("name", ""),
        device.get("card"),
        device.get("driver"),
        versions.get("torch"),
        versions.get("effprof"),
        plan["model"],
        plan["method"],
        document["outcome"],
        json.dumps(document),
    )
    with _open(path()) as connection:
        connection.execute("begin immediate")
        try:
            there = _same(connection, row) if once else None
            if there is not None:
                connection.execute("rollback")
                return there
            number = connection.execute(
                "insert into measurements (taken, device, card, driver, torch, effprof, model, "
                "method, outcome, document) values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            ).lastrowid
            found = _constants(connection)
            write_whole(calibration.path(), json.dumps(calibration.document(found)))
            connection.execute("commit")
        except BaseException:
            connection.execute("rollback")
            raise
    return int(number or 0)


def _same(connection: sqlite3.Connection, row: tuple[Any, ...]) -> int | None:
    """The number of a measurement of the same device and moment."""
    taken, device = row[0], json.loads(row[-1])["device"].get("uuid")
    rows = connection.execute("select id, document from measurements where taken = ?", (taken,))
    for number, text in rows:
        if json.loads(text)["device"].get("uuid") == device:
            return int(number)
    return None


def count() -> int:
    """How many measurements are kept."""
    with _open(path()) as connection:
        return int(connection.execute("select count(*) from measurements").fetchone()[0])


def cards() -> list[str]:
    """The catalog's cards that were measured."""
    with _open(path()) as connection:
        rows = connection.execute("select distinct card from measurements where card is not null")
        return [str(card) for (card,) in rows]


def table() -> pd.DataFrame:
    """Every measurement, one row each: bytes, seconds, relative errors."""
    rows = []
    if path().exists():  # to look is not to make one
        with _open(path()) as connection:
            rows = connection.execute(
                "select id, document from measurements order by id"
            ).fetchall()
    return pd.DataFrame([_flat(number, json.loads(text)) for number, text in rows], columns=COLUMNS)


COLUMNS = [
    *("id", "taken", "device", "card", "driver", "torch", "effprof", "outcome", "verdict"),
    *("model", "method", "rank", "micro_batch", "seq_len", "dtype", "config"),
    *("peak_allocated", "peak_reserved", "process_total", "context"),
    *("estimated_allocated", "estimated_reserved", "allocated_error"),
    *("step_seconds", "spread", "tokens_per_second", "energy_per_update", "throttles"),
]


def _flat(number: int, document: Mapping[str, Any]) -> dict[str, Any]:
    plan, measured, device = document["plan"], document["measured"], document["device"]
    memory, steps = measured.get("memory", {}), measured.get("step_seconds", {})
    expected = document["estimated"]["memory"]
    window = measured.get("windows", {}).get("steady", {})
    errors = {
        row["bucket"]: row["error"] for row in document["comparison"] if row["when"] == "peak"
    }
    median = steps.get("median")
    energy = window.get("energy")
    return {
        "id": number,
        "taken": document["taken"],
        "device": device.get("name"),
        "card": device.get("card"),
        "driver": device.get("driver"),
        **{name: document["versions"].get(name) for name in ("torch", "effprof")},
        **{name: document.get(name) for name in ("outcome", "verdict")},
        **{name: plan[name] for name in ("model", "method", "rank", "micro_batch", "seq_len")},
        "dtype": plan["dtype"],
        "config": json.dumps(plan, sort_keys=True),
        **{name: memory.get(name) for name in ("peak_allocated", "peak_reserved")},
        **{name: memory.get(name) for name in ("process_total", "context")},
        "estimated_allocated": expected["peak_allocated"],
        "estimated_reserved": expected["peak_reserved"],
        "allocated_error": errors.get("peak_allocated"),
        "step_seconds": median,
        "spread": steps.get("spread"),
        "tokens_per_second": plan["global_batch"] * plan["seq_len"] / median if median else None,
        "energy_per_update": energy / steps["n"] if energy and median else None,
        "throttles": ", ".join(window.get("throttles", [])),
    }


def one(number: int) -> dict[str, Any]:
    """One measurement's document. Raises UsageError for a number that is not there."""
    row = None
    if 0 < number < 1 << 63 and path().exists():
        with _open(path()) as connection:
            found = connection.execute("select document from measurements where id = ?", (number,))
            row = found.fetchone()
    if row is None:
        raise UsageError(f"There is no measurement {number}.", "effprof probe --list shows them.")
    document: dict[str, Any] = json.loads(row[0])
    return document


def _constants(connection: sqlite3.Connection) -> dict[str, Calibration]:
    """Each card's constants: medians over its newest probes under its newest driver and torch."""
    rows = connection.execute(
        "select card, driver, torch, taken, document from measurements "
        "where card is not null and outcome = 'ok' order by taken desc, id desc"
    )
    groups: dict[str, list[tuple[str, str, str, dict[str, Any]]]] = {}
    for card, driver, torch, taken, text in rows:
        group = groups.setdefault(card, [])
        if len(group) < _NEWEST and (not group or group[0][:2] == (driver, torch)):
            group.append((driver, torch, taken, json.loads(text)["measured"]))
    return {card: _calibration(card, group) for card, group in groups.items()}


def _calibration(card: str, group: list[tuple[str, str, str, dict[str, Any]]]) -> Calibration:
    driver, torch, taken, _ = group[0]

    def middle(values: list[Any]) -> int | None:
        known = [value for value in values if value is not None]
        return None if not known else round(statistics.median(known))

    measured = [row[3] for row in group]
    told = [one for one in measured if str(one.get("process_meter", "")).startswith("NVML")]
    rates: dict[str, list[float]] = {}
    for one in measured:
        for name, value in one.get("rates", {}).items():
            rates.setdefault(name, []).append(value)
    return Calibration(
        card,
        len(group),
        taken[:10],
        middle([one.get("memory", {}).get("context") for one in told]),
        middle([one.get("workspace") for one in measured]),
        {name: float(statistics.median(values)) for name, values in rates.items()},
        torch or "",
        driver or "",
    )
