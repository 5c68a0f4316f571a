"""Several plans measured one after another and held against their estimates."""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effprof.errors import EffprofError, UsageError
from effprof.plan import Plan, from_dict
from effprof.prober.compare import Comparison, compare
from effprof.prober.records import Probe
from effprof.prober.run import Habits, probe

SCHEMA = "effprof.validate/1"
TOLERANCE = 0.05


@dataclass(frozen=True)
class Validation:
    """What was measured of each plan; ``passed`` where every one is within the tolerance."""

    results: tuple[Comparison, ...]
    tolerance: float

    @property
    def passed(self) -> bool:
        return all(one.within(self.tolerance) for one in self.results)

    def as_dict(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "schema": SCHEMA,
            "tolerance": self.tolerance,
            "passed": self.passed,
            "results": [
                one.as_dict() | {"within": one.within(self.tolerance)} for one in self.results
            ],
        }


def validate(
    plans: Sequence[Plan],
    habits: Habits,
    *,
    tolerance: float = TOLERANCE,
    calibrated: bool = True,
    named: bool = False,
    run: Callable[[Plan, Habits], Probe] = probe,
    on_result: Callable[[Comparison, float], None] = lambda result, left: None,
) -> Validation:
    """Probe each plan in turn. ``on_result`` has each result and the seconds that are left, about.

    A plan that cannot be run is a result, too: nothing measured before it is lost.
    """
    results: list[Comparison] = []
    began = time.monotonic()
    for number, plan in enumerate(plans, 1):
        try:
            found = run(plan, habits)
        except EffprofError as problem:
            found = Probe(plan, "failed", f"{problem.message} {problem.hint}", {})
        results.append(compare(found, calibrated=calibrated, named=named))
        left = (time.monotonic() - began) / number * (len(plans) - number)
        on_result(results[-1], left)
    return Validation(tuple(results), tolerance)


def plans_of(path: Path, device: Callable[[], str]) -> list[Plan]:
    """The plans of a file: JSON (one, or a list), JSON lines, or TOML with ``[[plan]]`` tables.

    Documents that ``--json`` printed count by their plan. ``device`` is asked for plans that name
    none. Every plan is checked before any is run. Raises UsageError.
    """
    rows = _rows(path)
    if not rows:
        raise UsageError(f"{str(path)!r} holds no plan.", "Write one plan per line as JSON.")
    plans = []
    for number, row in enumerate(rows, 1):
        values = row["plan"] if isinstance(row.get("plan"), dict) else row
        if values.get("device") is None:
            values = {**values, "device": device()}
        try:
            plans.append(from_dict(values))
        except UsageError as problem:
            raise UsageError(
                f"Plan {number} of {str(path)!r}: {problem.message}", problem.hint
            ) from None
    return plans


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            table = tomllib.loads(text)
            found: Any = table.get("plan", table)
        elif path.suffix == ".jsonl":
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            found = json.loads(text)
    except OSError as problem:
        raise UsageError(
            f"Cannot read {str(path)!r}: {problem.strerror}.", "Give a file of plans."
        ) from None
    except ValueError as problem:
        raise UsageError(
            f"{str(path)!r} is no file of plans: {problem}.",
            "Write one plan per line as JSON into a .jsonl file, or [[plan]] tables into a .toml.",
        ) from None
    if isinstance(found, dict) and isinstance(found.get("results"), list):
        found = found["results"]
    rows = found if isinstance(found, list) else [found]
    if not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{str(path)!r} holds something that is no plan.", "See --json's plan.")
    return rows
