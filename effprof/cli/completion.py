"""What a shell offers after TAB: names from the catalogs, never torch. Nothing is read before it is
asked for: every command imports this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from effprof.fields import CHOICES

Complete = Callable[[str], list[str]]


def _matching(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def methods(incomplete: str) -> list[str]:
    """Method names."""
    from effprof import registry

    return _matching(registry.names(), incomplete)


def method_list(incomplete: str) -> list[str]:
    """``all``, or names separated by commas, of which the last is completed."""
    before, comma, last = incomplete.rpartition(",")
    found = [f"{before}{comma}{name}" for name in methods(last)]
    return found if comma else _matching(["all"], last) + found


def models(incomplete: str) -> list[str]:
    """Presets; the shell adds files."""
    from effprof.architectures import presets

    return _matching(dict.fromkeys(one["name"] for one in presets().values()), incomplete)


def gpus(incomplete: str) -> list[str]:
    """The catalog's cards."""
    from effprof import gpus as cards

    return _matching(cards.catalog(), incomplete)


def words(*known: str) -> Complete:
    """A few words."""
    return lambda incomplete: _matching(known, incomplete)


def of_plan(name: str) -> Complete | None:
    """What completes a plan's flag; a shell's own files where that is None."""
    own: dict[str, Complete] = {"model": models, "method": methods, "update": methods, "gpu": gpus}
    return own.get(name) or (words(*CHOICES[name]) if name in CHOICES else None)
