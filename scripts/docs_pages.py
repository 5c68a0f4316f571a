"""Pages of the documentation that follow from the app, its methods and its benchmarks.

mkdocs runs it (mkdocs-gen-files); nothing it writes is committed.
"""

from __future__ import annotations

import csv
import json
import os
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent


def pages() -> dict[str, str]:
    """Every generated page by its path."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    found = {"index.md": readme, "changelog.md": changes}
    found |= {"commands.md": commands(), "json.md": documents(), "accuracy.md": accuracy()}
    return found | methods()


def commands() -> str:
    """The help of every command, as it is printed at 80 columns."""
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers import run_cli

    from effprof.cli import COMMANDS

    with mock.patch.dict(os.environ, COLUMNS="80"):
        texts = {name: run_cli(name, "--help")[1] for name in COMMANDS}
        parts = ["# Commands\n", fenced(run_cli("--help")[1])]
    parts += [f"\n## effprof {name}\n\n{fenced(text)}" for name, text in texts.items()]
    shell = (
        "\n## Completion\n\n`effprof --install-completion` teaches your shell the commands, and "
        "the names of models, methods, cards and choices.\n"
    )
    return "\n".join([*parts, shell])


def documents() -> str:
    """Each JSON schema as a table."""
    parts = [
        "# JSON documents\n",
        "With `--json` standard output holds exactly one document and nothing else; what is for "
        "people goes to standard error. `schema` names the document and its version: names are "
        "added within a version, never removed or given another meaning. Sizes are integers of "
        "bytes, times seconds. The JSON Schemas lie in the package, `effprof/schemas/`.\n",
    ]
    for path in sorted((ROOT / "effprof" / "schemas").glob("*.json")):
        schema = json.loads(path.read_text(encoding="utf-8"))
        rows = list(fields(schema, ""))
        parts.append(f"## {schema['$id']}\n\n{schema['description']}\n")
        parts.append(table(("name", "type", "meaning"), rows))
    return "\n".join(parts)


def fields(schema: dict[str, Any], prefix: str) -> Iterable[tuple[str, str, str]]:
    """(name, type, meaning) of every name in a schema, depth first."""
    required = schema.get("required", [])
    for name, one in schema.get("properties", {}).items():
        kinds = one.get("type", "constant" if "const" in one else "anything")
        kinds = " or ".join(kinds) if isinstance(kinds, list) else kinds
        kinds += "" if name in required else ", not always"
        yield f"`{prefix}{name}`", kinds, one.get("description", "")
        yield from fields(one, f"{prefix}{name}.")
        yield from fields(one.get("items", {}), f"{prefix}{name}[].")


def methods() -> dict[str, str]:
    """A page for each method from its FACTS, and a list of them."""
    from effprof import published, registry

    found, rows = {}, []
    for name in registry.names():
        one = registry.method(name)
        facts = one.facts
        kind = "layer" if one.layer else "update"
        rows.append((f"[{name}]({name}.md)", facts.summary, facts.paper, kind))
        settings = registry.setting_fields(one.addressed)
        sizes = list(facts.defaults)
        given = [
            (f"`{key}`", default(item), *(str(facts.defaults[s].get(key, "")) for s in sizes))
            for key, item in settings.items()
        ]
        results = [
            (f"{row.model} {row.variant}", row.rank, f"{row.tokens} B", perplexity, row.citation)
            for row in published.of(name)
            if (perplexity := row.perplexity) is not None
        ]
        text = [
            f"# {facts.title}\n\n`--method {name}`: {facts.summary}.\n",
            f"Paper: {facts.paper} ({facts.equations}). Reference code: {facts.reference}.\n",
            "## Settings\n",
            table(("setting", "default", *sizes), given) if given else "None.\n",
            "## Deviations\n",
            "\n".join(f"- {line}" for line in facts.deviations) + "\n",
            "## Published results\n",
            "Perplexity on C4.\n" if results else "None is known.\n",
            table(("model", "rank", "tokens", "perplexity", "source"), results) if results else "",
            f"## Try it\n\n```bash\neffprof estimate --model 1b --method {name}\n```\n",
        ]
        found[f"methods/{name}.md"] = "\n".join(text)
    head = "# Methods\n\nA layer half replaces weight matrices, an update half is the optimizer's; "
    head += "one goes on the other: `--method sltrain --update fira`.\n\n"
    found["methods/index.md"] = head + table(("method", "what it does", "paper", "kind"), rows)
    return found


def default(item: Any) -> str:
    """A setting's default; none where it follows from the size."""
    import dataclasses

    return "" if item.default is dataclasses.MISSING else str(item.default)


def accuracy() -> str:
    """Errors of the estimate against traces and recordings, from the benchmarks' files."""
    traced = read("accuracy.csv")
    parts = [
        "# How true it is\n",
        "The first link is against other people's GPUs: the table in [Start](index.md) is held by "
        "a test. This page is drawn from the benchmarks' own files, with every plan in them.\n",
        f"## Estimated against traced: {len(traced)} plans\n",
        "`benchmarks/accuracy.py` draws plans at random; errors are of the allocated peak.\n",
    ]
    for column in ("method", "model", "dtype", "checkpointing", "attention"):
        rows = [spread(value, errors) for value, errors in grouped(traced, column)]
        parts += [f"### By {column}\n", table((column, "plans", "median", "worst"), rows)]
    recorded = read("accuracy_real.csv")
    parts += [
        f"## Traced against recorded: {len(recorded)} real steps\n",
        "`benchmarks/accuracy.py --real`: the CPU allocator's own record of a real step at 60m.\n",
        table(
            ("method", "traced bytes", "recorded bytes", "error"),
            [
                (
                    r["method"],
                    f"{int(r['traced']):,}",
                    f"{int(r['recorded']):,}",
                    percent(r["error"]),
                )
                for r in recorded
            ],
        ),
    ]
    return "\n".join(parts)


def read(name: str) -> list[dict[str, str]]:
    with (ROOT / "benchmarks" / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def grouped(rows: list[dict[str, str]], column: str) -> list[tuple[str, list[float]]]:
    """Absolute errors by the values of a column."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row[column], []).append(abs(float(row["error"])))
    return sorted(found.items())


def spread(value: str, errors: list[float]) -> tuple[str, ...]:
    return value, str(len(errors)), percent(statistics.median(errors)), percent(max(errors))


def percent(value: str | float) -> str:
    return f"{100 * float(value):.4f} %"


def fenced(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```\n"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    cells = ([re.sub(r"\s+", " ", str(cell)).replace("|", "\\|") for cell in row] for row in lines)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells) + "\n"


if "mkdocs_gen_files" in sys.modules:  # mkdocs runs it; a test imports it
    import mkdocs_gen_files

    for path, text in pages().items():
        with mkdocs_gen_files.open(path, "w", encoding="utf-8") as page:
            page.write(text)
