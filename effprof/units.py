"""Bytes, FLOPs, tokens and seconds to text and back, decided once.

Sizes are integers of bytes until they are printed. Memory is printed in GiB (2**30), as CUDA and
NVML count it; published tables use GB (1e9) and are labelled so.
"""

from __future__ import annotations

import re

from effprof.errors import UsageError

KIB, MIB, GIB = 2**10, 2**20, 2**30
GB = 10**9

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_BINARY = {"kib": KIB, "mib": MIB, "gib": GIB, "tib": 2**40}
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_count(text: str, name: str) -> int:
    """A count of tokens such as ``13.1B``, ``300k`` or ``4096``. Raises UsageError."""
    match = _NUMBER.fullmatch(text)
    if match is None or match[2].lower() not in _DECIMAL:
        raise UsageError(
            f"{name} {text!r} is not a count.", f"Type for example {name} 13.1B or 300M."
        )
    number = float(match[1]) * _DECIMAL[match[2].lower()]
    value = round(number) if number < 1e18 else 0
    if value <= 0:
        raise UsageError(
            f"{name} must be positive and below 1e18, not {text!r}.", f"Type for example {name} 1B."
        )
    return value


def parse_bytes(text: str, name: str) -> int:
    """A memory size such as ``24GB`` (1e9) or ``24GiB`` (2**30), told apart. Raises UsageError."""
    match = _NUMBER.fullmatch(text)
    unit = match[2].lower() if match else ""
    scale = _BINARY.get(unit) or (
        _DECIMAL.get(unit[:-1]) if unit.endswith("b") and unit != "b" else None
    )
    if match is None or scale is None or not 1 <= float(match[1]) * scale < 1e18:
        raise UsageError(
            f"{name} {text!r} is not a size.", f"Type for example {name}=24GB or 22.5GiB."
        )
    return round(float(match[1]) * scale)


def parse_duration(text: str, name: str) -> float:
    """Seconds of a time such as ``90s``, ``30min`` or ``12h``. Raises UsageError."""
    match = _NUMBER.fullmatch(text)
    if match is None or match[2].lower() not in _SECONDS or not 0 < float(match[1]) < 1e9:
        raise UsageError(f"{name} {text!r} is not a time.", f"Type for example {name} 12h.")
    return float(match[1]) * _SECONDS[match[2].lower()]


def gib(size: int, digits: int = 2) -> str:
    """Bytes as GiB, or MiB and KiB where GiB would show nothing."""
    if abs(size) >= GIB / 10:
        return f"{size / GIB:.{digits}f} GiB"
    if abs(size) >= MIB / 10:
        return f"{size / MIB:.1f} MiB"
    return f"{size / KIB:.1f} KiB" if size else "0"


def quantity(value: float, unit: str = "") -> str:
    """A large number with its decimal prefix: ``13.1 TFLOP``, ``1.34 B`` without a unit."""
    prefixes = (
        ("", "k", "M", "G", "T", "P", "E", "Z") if unit else ("", "k", "M", "B", "T", "P", "E", "Z")
    )
    power = 0
    while abs(value) >= 999.5 and power < len(prefixes) - 1:
        value /= 1000
        power += 1
    digits = 0 if power == 0 else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f} {prefixes[power]}{unit}".rstrip()


def duration(seconds: float) -> str:
    """Seconds as text a person reads: ``0.35 s``, ``4 min 10 s``, ``31.0 h``."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.1f} days"
