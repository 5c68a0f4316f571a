"""The measurements kept so far, for ``effprof probe --list``, ``--show`` and ``--export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from effprof.errors import UsageError, unknown

_FORMATS = ("csv", "parquet")


def kept(
    *, listed: bool, show: int | None, export: str | None, out: Path | None, as_json: bool
) -> int:
    """List, show or export them; the exit code. Raises UsageError."""
    if export is not None and export not in _FORMATS:
        raise unknown("--export format", export, _FORMATS)
    from effprof.measure import store

    if show is not None:
        print(json.dumps(store.one(show), indent=None if as_json else 2))
        return 0
    table = store.table()
    if export is not None:
        if as_json:
            raise UsageError("--json has no effect with --export.", "Type --list --json.")
        return _export(table, export, out)
    if as_json:
        rows = table.drop(columns="config").to_json(orient="records")
        print(f'{{"schema": "effprof.measurements/1", "measurements": {rows}}}')
    else:
        from effprof.report.probe import show_measurements

        show_measurements(table, str(store.path()))
    return 0


def _export(table: Any, kind: str, out: Path | None) -> int:
    from effprof.files import write_whole

    if kind == "csv":
        text = table.to_csv(index=False)
        if out is None:
            print(text, end="")
            return 0
        write_whole(out, text)
    elif out is None:
        raise UsageError("A parquet file cannot be printed.", "Add --out measurements.parquet.")
    else:
        write_whole(out, table.to_parquet(index=False))
    from effprof.report.terminal import line

    line(f"{len(table)} measurements in {out}")
    return 0
