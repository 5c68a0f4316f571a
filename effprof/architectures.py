"""Architectures by name: presets, and files of a user's own."""

from __future__ import annotations

import functools
import json
import tomllib
from pathlib import Path
from typing import Any

from effprof.configuration import from_config
from effprof.errors import UsageError, unknown
from effprof.model import Architecture

PRESETS = Path(__file__).parent / "presets"
_ADMITTED: dict[str, Architecture] = {}


@functools.cache
def presets() -> dict[str, dict[str, Any]]:
    """Every preset by name and alias."""
    with open(PRESETS / "models.toml", "rb") as file:
        table: dict[str, dict[str, Any]] = tomllib.load(file)
    named = {}
    for name, config in table.items():
        aliases = config.pop("aliases")
        config["name"] = name
        named.update(dict.fromkeys((name, *aliases), config))
    return named


def known(model: str) -> bool:
    """Whether a preset has this name, or a file or folder is there."""
    return _preset(model) is not None or Path(model).exists()


def _preset(model: str) -> dict[str, Any] | None:
    return presets().get(model.lower().replace("_", "-"))


def name_of(file: Path) -> str:
    """What a model is called: its file, or the folder of a config.json."""
    return file.parent.resolve().name if file.name == "config.json" else file.stem


def admit(model: str, shape: Architecture) -> None:
    """Let a model's name stand for this architecture."""
    _ADMITTED[model] = shape


def architecture(model: str) -> Architecture:
    """The architecture of a preset name or of a path to a config.json (or its folder).

    Raises UsageError for an unknown name, an unreadable file, an unsupported type or a bad field.
    """
    return _ADMITTED.get(model) or _architecture(model)


@functools.cache
def _architecture(model: str) -> Architecture:
    path = Path(model)
    preset = _preset(model)
    if preset is None and (model.endswith(".json") or path.is_dir()):
        file = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(file.read_text(encoding="utf-8-sig"))
        except OSError as problem:
            raise UsageError(
                f"Cannot read {str(file)!r}: {problem.strerror}.",
                "Give a preset name or the path of a Hugging Face config.json.",
            ) from None
        except ValueError as problem:
            raise UsageError(
                f"{str(file)!r} is not valid JSON: {problem}.", "Download config.json again."
            ) from None
        return from_config(config, name_of(file))
    if preset is None:
        if "/" in model:
            raise UsageError(
                f"There is no file {model!r}.",
                "A model of the Hub is given by its config.json: save it, and type its path.",
            )
        raise unknown("model", model, presets(), "A path to a config.json works too.")
    config = {key: value for key, value in preset.items() if key != "name"}
    return from_config(config, preset["name"])


def nearest_size(sizes: tuple[str, ...], parameters: int) -> str:
    """The preset size whose parameter count is nearest by ratio."""

    def distance(size: str) -> float:
        ratio = architecture(size).parameters / parameters
        return max(ratio, 1 / ratio)

    return min(sizes, key=distance)
