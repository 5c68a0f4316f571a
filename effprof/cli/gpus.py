"""effprof gpus: the cards that are known, with their numbers and where those are from."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from effprof.cli import completion

NAME = "gpus"
EPILOG = """\b
Examples:
  effprof gpus
  effprof gpus rtx-4090 --json"""


def command(
    name: Annotated[
        str | None,
        typer.Argument(
            help="One card, or its numbers as mem=24GB,bw=1TB/s,bf16=165T.",
            autocompletion=completion.gpus,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> int:
    """List accelerators, or one with its source."""
    from effprof import gpus

    cards = [gpus.gpu(name)] if name else list(gpus.catalog().values())
    if as_json:
        rows = [card.as_dict() for card in cards]
        print(json.dumps({"schema": "effprof.gpus/1", "gpus": rows}))
    elif name:
        from effprof.report.gpus import show_gpu

        show_gpu(cards[0].calibrated())
    else:
        from effprof.report.gpus import show_gpus

        show_gpus(cards)
    return 0
