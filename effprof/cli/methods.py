"""effprof methods: what there is, and the facts of one."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from effprof import published, registry
from effprof.cli import completion

NAME = "methods"
REFERENCE = "1b"
EPILOG = """\b
Examples:
  effprof methods
  effprof methods galore"""


def command(
    name: Annotated[
        str | None, typer.Argument(help="One method.", autocompletion=completion.methods)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> int:
    """List the methods, or show one's settings, costs and sources."""
    chosen = [registry.method(n) for n in ([name] if name else registry.names())]
    shares = held_shares([method.name for method in chosen])
    if as_json:
        rows = [_row(m) | {"held_at_1b": shares[m.name]} for m in chosen]
        print(json.dumps({"schema": "effprof.methods/1", "methods": rows}))
        return 0
    from effprof.report.methods import show_method, show_methods

    if name:
        show_method(chosen[0], shares[chosen[0].name])
    else:
        show_methods(chosen, shares)
    return 0


def held_shares(names: list[str]) -> dict[str, float]:
    """Weights, gradients, optimizer states and buffers of each method at 1b, relative to full."""
    from effprof.plan import Plan
    from effprof.step import work_out

    def held(name: str) -> int:
        step = work_out(Plan(model=REFERENCE, method=name))
        kept = sum(step.resident().values())
        gradients = [
            sum(map(step.gradient_bytes, one.tensors))
            for unit, times in step.units()
            for one in unit.trained * times
        ]
        if step.turns:
            turns = [
                sum(step.gradient_bytes(t) for one in turn.values() for t in one.tensors)
                for turn in step.turns
            ]
            return kept + max(turns)
        return kept + (max(gradients) if step.plan.per_layer_update else sum(gradients))

    full = held(registry.default())
    return {name: held(name) / full for name in names}


def _row(method: registry.Method) -> dict[str, Any]:
    fields = registry.setting_fields(method.addressed)
    return {
        "name": method.name,
        **dataclasses.asdict(method.facts),
        "update": method.update_name,
        "kind": "layer" if method.layer else "update",
        "published": [one._asdict() for one in published.of(method.name)],
        "settings": {
            key: None if field.default is dataclasses.MISSING else field.default
            for key, field in fields.items()
        },
    }
