"""Methods as people read them: what there is, and everything about one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from effprof import published, registry
from effprof.plan import Plan
from effprof.registry import Method
from effprof.report.terminal import console, table
from effprof.step import Step, Unit, work_out
from effprof.units import MIB, quantity

SHOWN = 14  # published rows


def show_methods(methods: Sequence[Method], shares: Mapping[str, float]) -> None:
    """One line per method; ``shares`` is what each holds at 1b relative to full."""
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("method", "what it does", "paper", "kind"):
        rows.add_column(name, no_wrap=name == "method")
    rows.add_column("1b", justify="right")
    for method in methods:
        kind = "layer" if method.layer else "update"
        paper = method.facts.paper.split(";")[0].removeprefix("arXiv ")
        share = f"{100 * shares[method.name]:.0f} %"
        rows.add_row(method.name, method.facts.summary, paper, kind, share)
    out = console()
    out.print(rows)
    out.print(
        "1b: weights, gradients, optimizer states and buffers at 1b, relative to full. Of kind "
        "layer with\nany update: --method sltrain --update fira.",
        style="dim",
    )
    out.print("Next: effprof methods NAME shows settings, costs, deviations, published results.")


def show_method(method: Method, share: float) -> None:
    """Facts, settings with their defaults by size, costs, deviations, and published results."""
    out, facts = console(), method.facts
    out.print(Text(f"{method.name}: {facts.title}", style="bold"))
    out.print(
        f"{facts.summary}\nPaper: {facts.paper} ({facts.equations})\nReference code: "
        f"{facts.reference}"
    )
    _show_settings(out, method)
    _show_costs(out, method, share)
    out.print("Deviations:", style="bold")
    for line in facts.deviations:
        out.print(f"- {line}")
    _show_published(out, method.name)
    out.print(f"Next: effprof estimate --model 1b --method {method.name}")


def _show_settings(out: Any, method: Method) -> None:
    facts = method.facts
    sizes = list(facts.defaults)
    rows = table("setting", "default", *sizes)
    fields = registry.setting_fields(method.addressed)
    for key, field in fields.items():
        default = "" if field.default is dataclasses.MISSING else str(field.default)
        rows.add_row(key, default, *(str(facts.defaults[size].get(key, "")) for size in sizes))
    rates = facts.lr or method.update.FACTS.lr
    rates_shown = ", ".join(f"{size} {rate:g}" for size, rate in rates.items())
    if fields:
        out.print(rows)
    out.print(f"Learning rate (--lr): {rates_shown}")
    if method.layer and not method.one_file:
        names = ", ".join(registry.setting_fields(method.update))
        out.print(f"Its update half is {method.update_name}: --set update.… of {names}")


def _show_costs(out: Any, method: Method, share: float) -> None:
    """Per matrix of the 1b model, one row for each shape."""
    step = work_out(Plan(model="1b", method=method.name))
    rows = table("per matrix at 1b", "weights", "states", "buffers", "backward keeps", "update")
    seen: set[tuple[int, ...]] = set()
    for unit in step.layer:
        if unit.targeted and unit.matrix.shape not in seen:
            seen.add(unit.matrix.shape)
            rows.add_row(*_costs(step, unit))
    out.print(rows)
    out.print(
        f"Held at 1b (weights, gradients, states, buffers): {100 * share:.0f} % of full's. "
        f"Kept per {step.plan.positions:,} tokens, the input (shared by q, k, v) not counted.",
        style="dim",
    )


def _costs(step: Step, unit: Unit) -> tuple[str, ...]:
    sizes = {"weights": 0, "buffers": 0}
    for tensor in unit.tensors:
        sizes[tensor.role] += step.nbytes(tensor)
    states = sum(step.nbytes(tensor) for one in unit.trained for tensor in one.state)
    kept = sum(step.nbytes(tensor) for tensor in unit.saved.extra)
    work = 0.0
    for one in unit.trained:
        half, settings = step.plan.recipe.half(covered=one.covered)
        declared = half.flops(one.matrix, step.plan.positions, settings)
        work += sum(declared.update.values()) + sum(declared.elementwise.values())
    shape = f"{unit.matrix.rows} × {unit.matrix.columns}"
    found = (sizes["weights"], states, sizes["buffers"], kept)
    return shape, *(f"{size / MIB:.2f} MiB" for size in found), quantity(work, "FLOP")


def _show_published(out: Any, name: str) -> None:
    found = published.of(name)
    if not found:
        out.print("effprof's table of published C4 perplexities has none of it.", style="dim")
        return
    rows = table("published", "rank", "tokens", "perplexity", "GB", "source", "read in")
    for one in found[:SHOWN]:
        tokens = f"{one.tokens} B" if one.tokens else ""
        label = f"{one.model} {one.variant}".strip()
        source = f"{one.source} {one.table}"
        evidence = one.evidence.rpartition("/")[2]
        row = (label, one.rank, tokens, f"{one.perplexity:g}", one.memory, source, evidence)
        rows.add_row(*row)
    out.print(rows)
    if len(found) > SHOWN:
        out.print(f"… and {len(found) - SHOWN} more: effprof methods {name} --json", style="dim")
