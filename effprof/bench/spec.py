"""A comparison as it is asked for: arms with learning rates, one budget of data, one protocol."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effprof.errors import UsageError, unknown
from effprof.plan import Plan, from_dict
from effprof.recommender.compare import ranks_of_method
from effprof.trainer.run import default_lr, make

SEARCHES = ("grid", "optuna")
_TABLES = ("bench", "plan", "train", "settings", "arm")
_BENCH = ("title", "models", "methods", "ranks", "seeds", "search", "trials", "lr", "lr_factors")
_ARM = ("label", "model", "method", "update", "rank", "settings", "update_settings", "lr")


@dataclass(frozen=True)
class Arm:
    """One line of the table: a plan and the learning rates it is tried with, in that order (or,
    with a search, the ends of their range).
    """

    label: str
    plan: Plan
    rates: tuple[float, ...]

    @property
    def identity_name(self) -> str:
        """What a study calls the arm when it says what differs."""
        return f"arm {self.label!r}"

    @property
    def folder(self) -> str:
        """The label as the start of a folder's name."""
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.label).strip("-")


@dataclass(frozen=True)
class Spec:
    """A comparison: every arm gets ``trials`` learning rates, and its best one ``seeds`` seeds."""

    title: str
    arms: tuple[Arm, ...]
    train: Mapping[str, Any]
    search: str
    trials: int
    seeds: int

    @property
    def total(self) -> int:
        """How many runs the whole comparison is."""
        return len(self.arms) * (self.trials + self.seeds - 1)

    def identity(self) -> dict[str, Any]:
        """What must be the same when a study goes on, its text apart, by a name that an error can
        tell.
        """
        found: dict[str, Any] = {"search": self.search, "trials": self.trials, "seeds": self.seeds}
        found |= {f"train.{key}": value for key, value in self.train.items() if key not in _FREE}
        for arm in self.arms:
            plan = {k: v for k, v in arm.plan.as_dict().items() if k not in ("model", "device")}
            shape = {"architecture": dict(arm.plan.architecture.config)}
            found[arm.identity_name] = {**plan, **shape, "rates": list(arm.rates)}
        whole: dict[str, Any] = json.loads(json.dumps(found))
        return whole


_FREE = ("data", "tokenizer", "save_every")  # where the text lies; when a run can be cut


def read(path: Path, device: str = "") -> Spec:
    """The spec in a TOML file, as ``parse`` reads it; paths in it are relative to it."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise UsageError(
            f"Cannot read {str(path)!r}: {problem.strerror}.", "Give a TOML file."
        ) from None
    except ValueError as problem:
        raise UsageError(f"{str(path)!r} is not TOML: {problem}.", "Repair it.") from None
    return parse(document, path.parent, device)


def parse(document: Mapping[str, Any], base: Path = Path(), device: str = "") -> Spec:
    """A spec from its tables; ``base`` is what relative paths in them start from, ``device`` where
    trials run if the tables name none.

    Raises UsageError for what is unknown, has no effect or cannot be trained.
    """
    _known("table", document, _TABLES)
    for name in _TABLES[:-1]:
        if not isinstance(document.get(name, {}), Mapping):
            raise UsageError(f"[{name}] is not a table.", f"Write [{name}] above its settings.")
    bench, train = dict(document.get("bench", {})), dict(document.get("train", {}))
    plan = {**({"device": device} if device else {}), **document.get("plan", {})}
    _known("[bench] setting", bench, _BENCH)
    search = bench.get("search", SEARCHES[0])
    if search not in SEARCHES:
        raise unknown("search", str(search), SEARCHES)
    for name in ("seed", "lr"):
        if name in train:
            raise UsageError(f"[train] {name} has no effect on a bench.", f"See {name} in [bench].")
    if "time_limit" in train:
        raise UsageError(
            "[train] time_limit would leave trials unfinished.",
            "Leave it out: a bench that is stopped goes on where it was.",
        )
    for key in ("data", "tokenizer", "init_from"):
        if key in train:
            train[key] = _here(train[key], base)
    drafts = [*_crossed(document, bench), *_named(document, bench)]
    if not drafts:
        raise UsageError("The bench compares nothing.", "Write methods = […], or [[arm]] tables.")
    arms = tuple(_arm(draft, plan, bench, train, base) for draft in drafts)
    labels = [arm.label for arm in arms]
    if len({arm.folder for arm in arms}) < len(arms):
        raise UsageError(f"Two arms are called alike: {labels}.", "Give each a label of its own.")
    trials = _whole(bench, "trials", len(arms[0].rates)) if search == "optuna" else 0
    if search == "grid" and "trials" in bench and bench["trials"] != len(arms[0].rates):
        raise UsageError(
            f"trials = {bench['trials']} disagrees with a grid of {len(arms[0].rates)}.",
            'Leave trials out, or write search = "optuna".',
        )
    _same_budget(arms, search)
    return Spec(
        str(bench.get("title", "effprof bench")),
        arms,
        train,
        search,
        trials or len(arms[0].rates),
        _whole(bench, "seeds", 1),
    )


def _crossed(document: Mapping[str, Any], bench: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """models × methods × ranks, a method without a rank once."""
    settings = document.get("settings", {})
    methods = _list(bench, "methods", [])
    for name in settings:
        if name not in methods:
            raise UsageError(
                f"[settings.{name}] has no effect: methods does not name {name}.",
                "Put it in methods, or the settings into an [[arm]].",
            )
    models = _models(document, bench)
    for model in models:
        for method in methods:
            own = dict(settings.get(method, {}))
            update = {key: own.pop(key) for key in list(own) if key.startswith("update.")}
            for rank in ranks_of_method(method, _list(bench, "ranks", [])):
                label = method if rank is None else f"{method} r{rank}"
                yield {
                    "label": label if len(models) == 1 else f"{Path(model).stem} {label}",
                    "model": model,
                    "method": method,
                    "rank": rank,
                    "settings": own,
                    "update_settings": {k.removeprefix("update."): v for k, v in update.items()},
                }


def _named(document: Mapping[str, Any], bench: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The [[arm]] tables, each with a label of its own."""
    for one in document.get("arm", []):
        _known("[[arm]] setting", one, _ARM)
        if not one.get("label") or not one.get("method"):
            raise UsageError("An [[arm]] needs a label and a method.", 'Write label = "…".')
        yield {"model": _models(document, bench)[0], **one}


def _models(document: Mapping[str, Any], bench: Mapping[str, Any]) -> list[str]:
    given = document.get("plan", {}).get("model")
    models = _list(bench, "models", [given] if given else [])
    if not models:
        raise UsageError("The bench names no model.", 'Write models = ["60m"] under [bench].')
    if given and models != [given]:
        raise UsageError("models and [plan] model disagree.", "Give one of them.")
    return models


def _arm(
    draft: Mapping[str, Any],
    plan: Mapping[str, Any],
    bench: Mapping[str, Any],
    train: Mapping[str, Any],
    base: Path,
) -> Arm:
    """An arm whose plan and run are checked. Raises UsageError, which names the arm."""
    values = {k: v for k, v in draft.items() if k not in ("label", "lr") and v not in (None, {})}
    try:
        made = from_dict({**plan, **values, "model": _here(str(draft["model"]), base)})
        rates = _rates(draft.get("lr", bench.get("lr")), bench, made)
        for rate in rates:
            make(made, Path(), {**train, "lr": rate})
    except UsageError as problem:
        raise UsageError(f"{draft['label']}: {problem.message}", problem.hint) from None
    return Arm(str(draft["label"]), made, rates)


def _rates(given: Any, bench: Mapping[str, Any], plan: Plan) -> tuple[float, ...]:
    """Learning rates in the order they are tried: named, or multiples of the method's published
    one. Raises UsageError.
    """
    factors = bench.get("lr_factors")
    if given is not None and factors is not None and "lr" in bench:
        raise UsageError("lr and lr_factors are two grids.", "Give one of them.")
    own = default_lr(plan)
    chosen = given if given is not None else [own * float(one) for one in factors or (1.0,)]
    chosen = chosen if isinstance(chosen, list) else [chosen]
    good = all(isinstance(x, int | float) and math.isfinite(x) and x > 0 for x in chosen)
    if not chosen or not good or len(set(chosen)) < len(chosen):
        raise UsageError(f"lr cannot be {chosen!r}.", "Give different positive numbers.")
    return tuple(float(f"{one:.6g}") for one in chosen)


def _same_budget(arms: Sequence[Arm], search: str) -> None:
    """Fair means the same number of learning rates, the same tokens, the same rows per update."""
    for arm in arms:
        if len(arm.rates) != len(arms[0].rates):
            raise UsageError(
                f"{arm.label} has {len(arm.rates)} learning rates, {arms[0].label} "
                f"{len(arms[0].rates)}.",
                "Give every arm as many.",
            )
    if search == "optuna" and len(arms[0].rates) < 2:
        raise UsageError(
            "A search needs a range of learning rates.", "Write lr_factors = [0.1, 10]."
        )


def _list(table: Mapping[str, Any], name: str, default: list[Any]) -> list[Any]:
    value = table.get(name, default)
    if not isinstance(value, list):
        raise UsageError(f"{name} = {value!r} is not a list.", f"Write {name} = [{value!r}].")
    return value


def _whole(table: Mapping[str, Any], name: str, default: int) -> int:
    value = table.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 1000:
        raise UsageError(f"{name} cannot be {value!r}.", f"Write {name} = {default}.")
    return value


def _known(kind: str, given: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in given:
        if name not in names:
            raise unknown(kind, name, names)


def _here(value: str, base: Path) -> str:
    """A path beside the spec, where there is one of that name; else the value as it is."""
    beside = base / value
    return str(beside.resolve()) if beside.exists() else value
