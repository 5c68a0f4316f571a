"""effprof report: what a command left behind, as a page to look at and to send."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

NAME = "report"
EPILOG = """\b
Examples:
  effprof report runs/first
  effprof report compare.json --out pareto.html"""


def command(
    subjects: Annotated[
        list[str],
        typer.Argument(
            metavar="SUBJECT…",
            help="A run's folder (several are drawn together); a file that --json, --record or "
            "--snapshot wrote; a measurement's number.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> int:
    """Write one self-contained HTML page about what a command left."""
    from effprof.files import check_writable
    from effprof.report.page import write_page
    from effprof.report.pages import page_of
    from effprof.report.subject import read

    check_writable(out)
    read_ones = [read(subject) for subject in subjects]
    page = page_of(read_ones)
    write_page(out, page)
    if as_json:
        kinds = [one.kind for one in read_ones]
        found = {"schema": "effprof.report/1", "out": str(out), "kinds": kinds}
        print(json.dumps(found | {"sections": [one.title for one in page.sections]}))
    else:
        print(f"{page.title}: {out} ({out.stat().st_size / 1000:.0f} kB). Open it in a browser.")
    return 0
