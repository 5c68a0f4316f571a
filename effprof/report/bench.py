"""A comparison's answer, for people: a table in the terminal and the same as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effprof.bench.results import Line, done
from effprof.bench.spec import Spec
from effprof.files import write_whole
from effprof.report.terminal import console, table
from effprof.units import MIB, duration, quantity

SCHEMA = "effprof.bench/1"
_REASON = 150  # characters of why a trial failed
_COLUMNS = (
    *("arm", "perplexity", "spread", "vs full", "lr", "tried", "held", "vs full"),
    *("peak", "tok/s"),
)


def show_costs(spec: Spec, found: Mapping[str, Any], *, answer: bool) -> None:
    """What it will take: the answer itself, or said before a run on standard error."""
    out = console(stderr=not answer)
    out.print(
        f"{spec.title}: {len(spec.arms)} arms × ({spec.trials} learning rates + {spec.seeds - 1} "
        f"seeds) = {found['trials']} trials of {quantity(found['positions_per_trial'])} positions"
    )
    for name, hours in found["hours"].items():
        told = "does not fit" if hours is None else f"{hours:,.1f} h in all"
        out.print(f"  {name:<14} {told}")


def show_bench(
    spec: Spec, lines: Sequence[Line], rows: Sequence[Mapping[str, Any]], files: Sequence[Path]
) -> None:
    """One line per arm and the remarks that belong to it."""
    out = console()
    out.print(spec.title, style="bold")
    shown = table(*_COLUMNS)
    for line in lines:
        shown.add_row(*_cells(line))
    out.print(shown)
    for text in remarks(spec, lines, rows):
        out.print(text, style="dim")
    out.print("Files: " + ", ".join(str(path) for path in files))


def _cells(line: Line) -> list[str]:
    if line.perplexity is None:
        what = "diverged" if line.diverged else "failed" if line.failed else ""
        return [line.arm.label, what, "", "", "", f"{line.tried}/{line.planned}", "", "", "", ""]
    assert line.low is not None
    assert line.high is not None
    spread = f"{line.low:.1f}–{line.high:.1f} ({line.seeds})" if line.seeds > 1 else "1 seed"
    return [
        line.arm.label,
        f"{line.perplexity:.2f}",
        spread,
        "" if line.to_full is None else f"{100 * line.to_full:+.1f} %",
        f"{line.lr:g}{'*' if line.edge else ''}",
        f"{line.tried}/{line.planned}" + (f", {line.diverged} div." if line.diverged else ""),
        f"{(line.held or 0) / MIB:.1f}",
        "" if line.memory_to_full is None else f"{100 * line.memory_to_full:+.0f} %",
        f"{(line.measured or 0) / MIB:.0f}",
        quantity(line.tokens_per_second or 0),
    ]


def remarks(spec: Spec, lines: Sequence[Line], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What has to be said beside the numbers."""
    count, tokens, seconds = done(rows)
    found = []
    if count < spec.total:
        found.append(f"PARTIAL: {count} of {spec.total} trials are done; the ranking may change.")
    found.append(
        f"{count} trials, {quantity(tokens)} positions, {duration(seconds)} of updates. "
        f"Perplexity: median over seeds of the best learning rate, on held-out text that also "
        f"chose that rate; spread: least and largest."
    )
    if any(line.edge for line in lines):
        found.append("* the best learning rate is the least or largest tried: more may be gained.")
    found.append(
        "held: weights, optimizer states and buffers the method declares, MiB; peak: measured "
        "during training" + (f" ({_meters(rows)})" if _meters(rows) else "") + ", MiB."
    )
    versions = {row["code"] for row in rows}
    if len(versions) > 1:
        found.append(f"The rows come from {len(versions)} states of effprof's code (column code).")
    for row in rows:
        if row["state"] != "done":
            which = f"{row['arm']} lr {row['lr']:g} seed {row['seed']} {row['state']}"
            reason = (row["reason"].strip().splitlines() or [""])[-1]
            found.append(f"{which}: {reason[:_REASON]}")
    return found


def _meters(rows: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(sorted({row["meter"] for row in rows if row["meter"]}))


def document(
    spec: Spec, lines: Sequence[Line], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The JSON document: every arm's line and every trial's row."""
    return {
        "schema": SCHEMA,
        "title": spec.title,
        "trials": {"done": len(rows), "planned": spec.total},
        "arms": [line.as_dict() for line in lines],
        "rows": list(rows),
        "remarks": remarks(spec, lines, rows),
    }


def write_summary(
    folder: Path, spec: Spec, lines: Sequence[Line], rows: Sequence[Mapping[str, Any]]
) -> None:
    """summary.md: the table and its remarks."""
    head = "| " + " | ".join(_COLUMNS) + " |\n| --- |" + " ---: |" * (len(_COLUMNS) - 1)
    body = ["| " + " | ".join(_cells(line)) + " |" for line in lines]
    notes = [f"- {text}" for text in remarks(spec, lines, rows)]
    text = "\n".join([f"# {spec.title}", "", head, *body, "", *notes, ""])
    write_whole(folder / "summary.md", text)
