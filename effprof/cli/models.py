"""effprof models: the presets, and the shape of one."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from effprof.architectures import architecture, presets
from effprof.cli import completion
from effprof.model import Architecture

NAME = "models"
EPILOG = """\b
Examples:
  effprof models
  effprof models path/to/config.json --json"""


def command(
    name: Annotated[
        str | None,
        typer.Argument(help="A preset or a config.json.", autocompletion=completion.models),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> int:
    """List the model presets, or show one's shape and parameters."""
    names = [name] if name else list(dict.fromkeys(c["name"] for c in presets().values()))
    shapes = [architecture(one) for one in names]
    if as_json:
        rows = [{**_shape(shape), "parameters": shape.parameters} for shape in shapes]
        print(json.dumps({"schema": "effprof.models/1", "models": rows}))
        return 0
    from effprof.report.terminal import show_models

    show_models(shapes)
    return 0


def _shape(shape: Architecture) -> dict[str, object]:
    return {f.name: getattr(shape, f.name) for f in dataclasses.fields(shape) if f.name != "config"}
