"""One self-contained HTML page: tables in the text, charts drawn from data beside them.

Light and dark, readable on a phone; its Content-Security-Policy forbids any network.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from effprof.files import write_whole
from effprof.report.plots import COLOURS


@dataclass(frozen=True)
class Chart:
    """``kind`` is a function of report.js (timeline, bars, lines, scatter), ``data`` its input."""

    title: str
    kind: str
    data: Any
    note: str = ""


@dataclass(frozen=True)
class Grid:
    """A table: columns of text to the left, of numbers to the right. ``folded`` hides it."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Prose:
    """Sentences, or with ``typed`` command lines that a button copies."""

    title: str
    lines: Sequence[str]
    typed: bool = False


Section = Chart | Grid | Prose


@dataclass(frozen=True)
class Page:
    """``tiles`` are the few figures that answer first: (name, value, good | bad | "")."""

    title: str
    subtitle: str
    tiles: Sequence[tuple[str, str, str]] = ()
    sections: Sequence[Section] = ()
    notes: Sequence[str] = field(default=())


def render(page: Page) -> str:
    """The page as text."""
    from importlib.metadata import version

    charts = [one for one in page.sections if isinstance(one, Chart)]
    parts = [f"<header><h1>{_text(page.title)}</h1><p>{_text(page.subtitle)}</p></header>"]
    if page.tiles:
        tiles = "".join(
            f'<div class="tile {_text(mood)}"><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>'
            for name, value, mood in page.tiles
        )
        parts.append(f'<dl class="tiles">{tiles}</dl>')
    numbers = iter(range(len(charts)))
    for one in page.sections:
        if isinstance(one, Chart):
            parts.append(_chart(one, next(numbers)))
        else:
            parts.append(_grid(one) if isinstance(one, Grid) else _prose(one))
    parts += [f'<p class="note">{_text(note)}</p>' for note in page.notes]
    parts.append(f"<footer>effprof {_text(version('effprof'))}</footer>")
    data = {"charts": [{"kind": one.kind, "data": one.data} for one in charts], "colours": COLOURS}
    values = {
        "TITLE": _text(page.title),
        "BODY": "\n".join(parts),
        "DATA": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
        "STYLE": _part("report.css"),
        "SCRIPT": _part("report.js"),
    }
    # Split first: what is put in is never searched for a place to put more.
    pieces = _part("report.html").split("@")
    return "".join(values[p] if i % 2 else p for i, p in enumerate(pieces))


def write_page(path: Path, page: Page) -> None:
    """Write the page whole. Raises EffprofError where it cannot be written."""
    write_whole(path, render(page))


def _part(name: str) -> str:
    return files("effprof.report").joinpath(name).read_text(encoding="utf-8")


def _text(value: str) -> str:
    return html.escape(value)


def _chart(chart: Chart, number: int) -> str:
    note = f'<p class="note">{_text(chart.note)}</p>' if chart.note else ""
    label = _text(chart.title)
    return (
        f'<section><h2>{label}</h2>{note}<div class="chart" data-chart="{number}" role="img" '
        f'aria-label="{label}"></div><noscript>This chart needs JavaScript.</noscript></section>'
    )


def _grid(grid: Grid) -> str:
    columns = [[row[i] for row in grid.rows] for i in range(len(grid.head))]
    marks = [' class="text"' if _is_text(column) else "" for column in columns]

    def line(kind: str, cells: Sequence[str]) -> str:
        made = zip(marks, cells, strict=True)
        return f"<tr>{''.join(f'<{kind}{m}>{_text(cell)}</{kind}>' for m, cell in made)}</tr>"

    head = f"<thead>{line('th', grid.head)}</thead>"
    body = "".join(line("td", row) for row in grid.rows)
    note = f'<p class="note">{_text(grid.note)}</p>' if grid.note else ""
    table = f'{note}<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'
    if grid.folded:
        return f"<details><summary>{_text(grid.title)}</summary>{table}</details>"
    return f"<section><h2>{_text(grid.title)}</h2>{table}</section>"


def _prose(prose: Prose) -> str:
    if prose.typed:
        copied = '<button type="button">Copy</button>'
        words = [  # a line breaks between words, not inside --flag
            " ".join(f"<span>{_text(word)}</span>" for word in one.split(" "))
            for one in prose.lines
        ]
        lines = [f'<div class="typed"><code>{one}</code>{copied}</div>' for one in words]
    else:
        lines = [f"<p>{_text(one)}</p>" for one in prose.lines]
    return f"<section><h2>{_text(prose.title)}</h2>{''.join(lines)}</section>"


def _is_text(column: Sequence[str]) -> bool:
    """Whether no cell is a number."""
    return not any(cell.lstrip("+-~")[:1].isdigit() for cell in column)
