"""effprof doctor: what is here, what can run, what is missing."""

from __future__ import annotations

import json
from typing import Annotated

import typer

NAME = "doctor"
EPILOG = """\b
Examples:
  effprof doctor
  effprof doctor --json"""


def command(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> int:
    """Driver, GPUs and versions: what can run, what to add."""
    from effprof.measure.doctor import examine

    found = examine()
    if as_json:
        print(json.dumps(found))
    else:
        from effprof.report.doctor import show_doctor

        show_doctor(found)
    return 0
