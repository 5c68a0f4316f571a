"""effprof methods: what there is, and the facts of one."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from effprof import registry

NAME = "methods"
EPILOG = """\b
Examples:
  effprof methods
  effprof methods galore"""


def command(
    name: Annotated[str | None, typer.Argument(help="One method.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> int:
    """List the methods, or show one's facts, settings and deviations from its paper."""
    chosen = [registry.method(n) for n in ([name] if name else registry.names())]
    if as_json:
        print(json.dumps({"schema": "effprof.methods/1", "methods": [_row(m) for m in chosen]}))
        return 0
    from effprof.report.terminal import show_method, show_methods

    if name:
        show_method(chosen[0])
    else:
        show_methods(chosen)
    return 0


def _row(method: registry.Method) -> dict[str, Any]:
    fields = registry.setting_fields(method.addressed)
    return {
        "name": method.name,
        **dataclasses.asdict(method.facts),
        "update": method.update_name,
        "kind": "layer" if method.layer else "update",
        "settings": {
            key: None if field.default is dataclasses.MISSING else field.default
            for key, field in fields.items()
        },
    }
