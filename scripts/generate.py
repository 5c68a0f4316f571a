"""Write what follows from the app: effprof/schemas/*.json and tests/help/*.txt.

    python scripts/generate.py            writes them
    python scripts/generate.py --slow     also those whose documents take minutes: find, bench
    python scripts/generate.py --check    exits 1 where the help on disk is not the app's

A schema is drawn from real documents (tests/samples.py): what was seen is described, what every one
of them has is required. Meanings come from scripts/meanings.toml, by name.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SCHEMAS = ROOT / "effprof" / "schemas"
HELP = ROOT / "tests" / "help"
KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
# Objects whose names are somebody's: settings, methods, phases, packages.
MAPS = {
    *("settings", "update_settings", "defaults", "lr", "left_out", "assumed", "packages"),
    *("versions", "periodic_seconds", "windows", "rates", "phases", "calibrated", "reasons"),
    *("differs", "cards"),
}
LATE = {"find", "bench"}  # drawn with --slow, else kept
# Present only where something was asked for or measured.
SOMETIMES = frozenset({"timeline", "validation_loss"})
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def main(arguments: list[str]) -> int:
    """Write, or with --check compare, and say how it went."""
    sys.path[:0] = [str(ROOT / "tests")]
    os.environ |= {"COLUMNS": "80", "EFFPROF_QUIET": "1", "HF_HUB_OFFLINE": "1"}
    texts = helps()
    if "--check" in arguments:
        stale = [name for name, text in texts.items() if not same(HELP / f"{name}.txt", text)]
        print(f"stale: {', '.join(stale)}; make generate" if stale else "the help is the app's")
        return 1 if stale else 0
    replace(HELP, "txt", texts)
    drawn = {name: printed(one) for name, one in schemas(samples("--slow" in arguments)).items()}
    kept = {path.stem: path.read_text(encoding="utf-8") for path in SCHEMAS.glob("*.json")}
    replace(SCHEMAS, "json", {**{name: kept[name] for name in kept.keys() & LATE}, **drawn})
    return 0


def helps() -> dict[str, str]:
    """`--help` of the app and of every command."""
    from helpers import run_cli

    from effprof.cli import COMMANDS

    return {name or "effprof": run_cli(*name.split(), "--help")[1] for name in ("", *COMMANDS)}


def samples(slow: bool) -> dict[str, list[Any]]:
    """Real documents of every kind."""
    import samples as made

    from effprof.prober import find

    find.LASTING, find.BRIEF = 12, 2  # updates that a micro-batch has to last: enough to time some
    with tempfile.TemporaryDirectory() as folder:
        texts = made.texts(Path(folder) / "texts")
        found = made.make(Path(folder) / "made", texts)
        late = made.make(Path(folder) / "slow", texts, made.SLOW) if slow else {}
        for name, more in late.items():
            found[name] = [*found.get(name, []), *more]
        return found


def schemas(documents: Mapping[str, list[Any]]) -> dict[str, Any]:
    """A JSON Schema per kind of document."""
    meanings = tomllib.loads((ROOT / "scripts" / "meanings.toml").read_text(encoding="utf-8"))
    found = {}
    for name, seen in sorted(documents.items()):
        body = node(seen, meanings, name)
        body["properties"]["schema"] = {"const": seen[0]["schema"]}
        found[name] = {
            "$schema": DIALECT,
            "$id": seen[0]["schema"],
            "description": meanings["documents"][name],
            **body,
        }
    return found


def node(values: Iterable[Any], meanings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The schema of a place in a document, from all the values seen there."""
    seen = list(values)
    kinds = sorted({KINDS[type(one)] for one in seen if type(one) in KINDS})
    if "number" in kinds:
        kinds = [kind for kind in kinds if kind != "integer"]
    objects = [one for one in seen if isinstance(one, dict)]
    lists = [one for one in seen if isinstance(one, list)]
    kinds += ["object"] * bool(objects) + ["array"] * bool(lists)
    if kinds in ([], ["null"]):
        return {}  # nothing was ever there to see
    made: dict[str, Any] = {"type": kinds[0] if len(kinds) == 1 else kinds}
    if lists:
        made["items"] = node((one for each in lists for one in each), meanings, where)
        if made["items"] == {"type": "null"} or not any(lists):
            made["items"] = {}
    if objects:
        made |= fields(objects, meanings, where)
    return made


def fields(
    objects: list[dict[str, Any]], meanings: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The names of an object; those of a map are anybody's."""
    if where.rpartition(".")[2] in MAPS:
        inside = node((one for each in objects for one in each.values()), meanings, f"{where}.*")
        return {"additionalProperties": inside}
    properties: dict[str, Any] = {}
    for name in dict.fromkeys(name for one in objects for name in one):
        place = f"{where}.{name}"
        meaning = meanings["places"].get(place) or meanings["names"].get(name)
        described = {"description": meaning} if meaning else {}
        values = (one[name] for one in objects if name in one)
        properties[name] = described | node(values, meanings, place)
    required = [
        name for name in properties if name not in SOMETIMES and all(name in one for one in objects)
    ]
    return {"properties": properties, "required": required}


def printed(schema: Mapping[str, Any]) -> str:
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def replace(folder: Path, suffix: str, texts: Mapping[str, str]) -> None:
    """Make a folder hold exactly these files, and say which changed."""
    folder.mkdir(exist_ok=True)
    for path in folder.glob(f"*.{suffix}"):
        if path.stem not in texts:
            path.unlink()
            print(f"removed {path.relative_to(ROOT)}")
    for name, text in texts.items():
        path = folder / f"{name}.{suffix}"
        if not same(path, text):
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
