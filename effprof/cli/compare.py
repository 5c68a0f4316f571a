"""effprof compare: methods and ranks side by side."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effprof.cli import completion
from effprof.cli.flags import refuse, values_of_methods, with_plan_flags
from effprof.errors import UsageError, unknown

if TYPE_CHECKING:
    from effprof.recommender.compare import Table

NAME = "compare"
EPILOG = """\b
Examples:
  effprof compare --model 1b --gpu rtx-4090
  effprof compare --model 350m --methods full,galore,fira --ranks 128:512 --png pareto.png"""


@with_plan_flags
def command(
    flags: Mapping[str, Any],
    methods: Annotated[
        str,
        typer.Option(
            help="all, or names separated by commas.", autocompletion=completion.method_list
        ),
    ] = "all",
    ranks: Annotated[
        str | None,
        typer.Option(help="64:1024 (doubling) or 64,128. [each method's]", show_default=False),
    ] = None,
    sort: Annotated[
        str,
        typer.Option(
            help="memory, time, perplexity or method.",
            autocompletion=completion.words("memory", "time", "perplexity", "method"),
        ),
    ] = "memory",
    lineage: Annotated[
        str | None,
        typer.Option(help="Whose perplexities. [that know most]", show_default=False),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Draw memory against perplexity.", show_default=False)
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="The same as a page to hover over.", show_default=False)
    ] = None,
    calibration: Annotated[
        bool, typer.Option("--calibration/--no-calibration", help="Use what probes measured.")
    ] = True,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated rows.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> int:
    """Memory, time and perplexity of every method, one line each."""
    from effprof.recommender import compare as comparing
    from effprof.report.live import progress

    refuse(flags, ("method", "rank"), "compare: it has --methods and --ranks")
    if as_csv and as_json:
        raise UsageError("--csv and --json are two outputs.", "Give one of them.")
    if sort not in comparing.ORDERS:
        raise unknown("--sort value", sort, comparing.ORDERS)
    names = comparing.methods_of(methods)
    wanted = [] if ranks is None else comparing.ranks_of(ranks, names)
    found = comparing.compare(
        values_of_methods(flags),
        names,
        wanted,
        order=sort,
        lineage=lineage or "",
        calibrated=calibration,
        on_row=progress("plans"),
    )
    if png:
        from effprof.report.scatter import draw_scatter

        draw_scatter(png, found)
    if html:
        from effprof.report.page import write_page
        from effprof.report.pages import page_of
        from effprof.report.subject import Subject

        write_page(html, page_of([Subject(html.stem, found.as_dict())]))
    _print(found, as_csv=as_csv, as_json=as_json)
    return 0


def _print(found: Table, *, as_csv: bool, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found.as_dict()))
    elif as_csv:
        rows = [row.as_dict() for row in found.rows]
        writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        from effprof.report.compare import show_comparison

        show_comparison(found)
