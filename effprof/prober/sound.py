"""Whether a record holds what its kind holds: recordings travel, and get damaged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MOST = 1 << 62
# A count is whole, neither it nor a number negative; ? may be null; counts and texts are maps.
_WINDOW = {
    **dict.fromkeys(("seconds",), "number"),
    **dict.fromkeys(("energy", "power"), "number?"),
    **dict.fromkeys(("allocated", "reserved", "used", "process", "utilisation"), "count?"),
    **dict.fromkeys(("clock", "temperature"), "count?"),
    **dict.fromkeys(("samples", "late"), "count"),
    "name": "text",
    "throttles": "list",
    "reasons": "texts",
}
_DEVICE = {
    **dict.fromkeys(("kind", "name"), "text"),
    **dict.fromkeys(("card", "uuid", "driver"), "text?"),
    **dict.fromkeys(("total", "available"), "count"),
    "capability": "number?",
    "reasons": "texts",
}
_RATES = ("matmul", "attention", "traffic", "decomposition", "launch", "dispatch", "pace", "fresh")
_KINDS: dict[str, dict[str, str]] = {
    "start": {"taken": "text", "versions": "texts", "device": "device", "plan": "map"},
    "reached": {"update": "text", "phase": "text"},
    "update": {
        **dict.fromkeys(("peaks", "resident"), "counts"),
        "kind": "text",
        "number": "count",
        "seconds": "number",
        "reserved": "count?",
    },
    "tape": dict.fromkeys(("events", "roles", "labels", "marks"), "list"),
    "counters": {
        **dict.fromkeys(("reserved", "process", "workspace"), "count?"),
        "meter": "text",
    },
    "oom": {**dict.fromkeys(("reserved", "process", "allocated"), "count?"), "meter": "text"},
    "step": {"seconds": "number"},
    "periodic": {"number": "count", "seconds": "number"},
    "rates": {**dict.fromkeys(_RATES, "number"), "dtype": "text"},
    "window": _WINDOW,
    "lost": {"reasons": "texts"},
    "no tape": {"why": "text"},
    "no rates": {"why": "text"},
    "end": {"outcome": "text", "detail": "text", "hint": "text", "code": "count"},
}


def check(record: Mapping[str, Any]) -> None:
    """Raises ValueError for a record with a field of another kind, or of none that is known."""
    kind = record["record"]
    if kind not in _KINDS:
        raise ValueError(f"{kind!r} is no kind of record")
    _check(record, _KINDS[kind])


def _check(values: Mapping[str, Any], fields: Mapping[str, str]) -> None:
    for name, value in values.items():
        if name in fields and not _is(value, fields[name]):
            raise ValueError(f"{name} cannot be {str(value)[:40]!r}")


def _is(value: Any, kind: str) -> bool:
    if kind.endswith("?"):
        return value is None or _is(value, kind[:-1])
    if kind in ("texts", "counts"):
        return isinstance(value, dict) and all(_is(one, kind[:-1]) for one in value.values())
    if kind == "device":
        if not isinstance(value, dict):
            return False
        _check(value, _DEVICE)
        return True
    if kind in ("count", "number"):
        types = (int,) if kind == "count" else (int, float)
        return isinstance(value, types) and not isinstance(value, bool) and 0 <= value < _MOST
    return isinstance(value, {"text": str, "list": list, "map": dict}[kind])
