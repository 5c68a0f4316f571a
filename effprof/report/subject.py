"""What a report can be about, read from wherever a command left it."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effprof.bench import DOCUMENT, JOURNAL
from effprof.errors import EffprofError, UsageError
from effprof.report.timeline import Timeline, recorded, whole

_HINT = (
    "Give the folder of a run or bench, what --json or --record wrote, a snapshot or a probe's id."
)


@dataclass(frozen=True)
class Subject:
    """A JSON document of a known ``schema``; ``metrics`` are a run's updates, ``recorded`` a tape
    that came with it.
    """

    name: str
    document: Mapping[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    recorded: Timeline | None = None

    @property
    def kind(self) -> str:
        """``train``, ``probe``, …: the schema without its number."""
        return str(self.document["schema"]).removeprefix("effprof.").partition("/")[0]


def read(text: str) -> Subject:
    """The folder of a run or a bench, a file, or a measurement's number. Raises UsageError."""
    path = Path(text)
    if path.is_dir():
        return _bench(path) if (path / JOURNAL).is_file() else _run(path)
    if text.isdecimal() and not path.exists():
        from effprof.measure import store

        return Subject(f"measurement {text}", store.one(int(text)))
    try:
        content = path.read_bytes()
    except OSError as problem:
        raise UsageError(f"Cannot read {text!r}: {problem.strerror}.", _HINT) from None
    if content[:1] == b"\x80":  # how every pickle since protocol 2 begins
        return _snapshot(path)
    try:
        document = json.loads(content)
    except ValueError as problem:
        return _recording(path, problem)
    if not isinstance(document, dict) or not str(document.get("schema")).startswith("effprof."):
        raise UsageError(f"{text!r} is not a document of effprof.", _HINT)
    return Subject(path.stem, document)


def _recording(path: Path, problem: ValueError) -> Subject:
    """A file of records, as ``probe --record`` writes it: its tape is the measured one."""
    from effprof.prober.compare import compare
    from effprof.prober.records import replay

    with path.open(encoding="utf-8", errors="replace") as file:
        if '"record"' not in file.readline():
            raise UsageError(f"{str(path)!r} is not JSON: {problem}.", _HINT) from None
    found = compare(replay(path), named=True)
    return Subject(path.stem, found.as_dict(), recorded=recorded(found.probe))


def _snapshot(path: Path) -> Subject:
    from effprof import snapshot

    found = snapshot.read(path)
    try:
        device = next(i for i, trace in enumerate(found["device_traces"]) if trace)
        tape = snapshot.recorded_tape(found, device)
    except (StopIteration, LookupError, TypeError, AttributeError) as problem:
        raise EffprofError(
            f"{str(path)!r} records no allocation ({type(problem).__name__}).",
            "Call torch.cuda.memory._record_memory_history() before what is to be recorded.",
        ) from None
    if not tape.events:
        raise EffprofError(f"{str(path)!r} records no allocation.", "Record a step of training.")
    shown = whole(tape, f"{path.name}, device {device}")
    return Subject(path.stem, {"schema": "effprof.snapshot/1"}, recorded=shown)


def _bench(folder: Path) -> Subject:
    """A study's folder, finished or not: its document, as its last trial left it."""
    if not (folder / DOCUMENT).is_file():
        raise UsageError(
            f"{str(folder)!r} is a bench without {DOCUMENT}.",
            f"`effprof bench SPEC.toml --out {folder} --summary` writes it.",
        )
    found = read(str(folder / DOCUMENT))
    return Subject(folder.resolve().name, found.document)


def _run(folder: Path) -> Subject:
    """A run's folder, finished or not."""
    from effprof.trainer.metrics import whole_rows

    if not (folder / "run.toml").is_file():
        raise UsageError(f"{str(folder)!r} is not a run: it has no run.toml.", _HINT)
    try:
        tables = tomllib.loads((folder / "run.toml").read_text(encoding="utf-8"))
        tables = {"plan": dict(tables["plan"]), "train": dict(tables["train"])}
    except (OSError, ValueError, LookupError, TypeError) as problem:
        damaged = f"{str(folder / 'run.toml')!r} is damaged: {problem}."
        raise UsageError(damaged, "Give another run.") from None
    rows = [json.loads(row) for row in _lines(folder / "metrics.jsonl", whole_rows)]
    if not all(isinstance(row, dict) and {"step", "loss"} <= row.keys() for row in rows):
        raise UsageError(f"{str(folder / 'metrics.jsonl')!r} is damaged.", "Resume the run.")
    document = {"schema": "effprof.train/1", "out": str(folder), **tables}
    summary = folder / "summary.json"
    if summary.is_file():
        try:
            document |= json.loads(summary.read_text(encoding="utf-8"))
        except (ValueError, TypeError) as problem:
            raise UsageError(f"{str(summary)!r} is damaged: {problem}.", "Delete it.") from None
    return Subject(folder.resolve().name, document, rows)


def _lines(path: Path, reader: Any) -> list[str]:
    return list(reader(path)) if path.is_file() else []
