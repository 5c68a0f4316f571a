"""The last recommendation, kept for ``effprof validate --last``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effprof.errors import EffprofError, UsageError
from effprof.files import home, write_whole
from effprof.plan import Plan, from_dict

# Of the card and the run it was recommended for: a probe uses what is here.
_ELSEWHERE = ("gpu", "tokens")


def path() -> Path:
    """Where it is kept."""
    return home() / "recommendation.json"


def keep(document: Mapping[str, Any]) -> None:
    """Replace the one before. Where that fails people are told, and the answer is still shown."""
    try:
        write_whole(path(), json.dumps(document) + "\n")
    except EffprofError as problem:
        sys.stderr.write(f"Warning: {problem.message} validate --last will not know this one.\n")


def plan() -> Plan:
    """The plan that was recommended, to be probed here. Raises UsageError where there is none."""
    try:
        values = json.loads(path().read_text(encoding="utf-8"))["plan"]
        return from_dict({**values, **dict.fromkeys(_ELSEWHERE)})
    except FileNotFoundError:
        raise UsageError(
            "Nothing has been recommended yet.", "Type effprof recommend --model 1b --gpu rtx-4090."
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"{str(path())!r} holds no recommendation.", "Run effprof recommend again."
        ) from None
