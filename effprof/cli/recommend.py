"""effprof recommend: which method, rank and batch for a model on a card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effprof.cli.flags import option, plan_values, refuse, values_of_methods, with_plan_flags
from effprof.errors import NoDeviceError, UsageError, unknown
from effprof.units import gib, parse_bytes

if TYPE_CHECKING:
    from effprof.gpus import Gpu
    from effprof.recommender.recommend import Recommendation
    from effprof.recommender.space import Space

NAME = "recommend"
EPILOG = """\b
Examples:
  effprof recommend --model 1b --gpu rtx-4090 --tokens 13.1B
  effprof recommend --model 350m --gpu rtx-3060 --objective memory --max-hours 200 --tokens 7.8B"""


@with_plan_flags
def command(
    flags: Mapping[str, Any],
    objective: Annotated[
        str, typer.Option(help="quality, time, memory or cost: what is best first.")
    ] = "quality",
    methods: Annotated[str | None, option("Methods to choose from, by commas. [all]")] = None,
    ranks: Annotated[
        str | None, option("64:1024 (doubling) or 64,128. [each method's, and what is published]")
    ] = None,
    vary: Annotated[
        list[str] | None, option("A setting's values to try, key=a,b; may be given several times.")
    ] = None,
    max_memory: Annotated[
        str | None, option("Of the process, such as 20GiB. [what is free here]")
    ] = None,
    margin: Annotated[float, typer.Option(help="Share of the memory that is kept free.")] = 0.05,
    max_hours: Annotated[float | None, option("Of the whole run.")] = None,
    min_tokens_per_second: Annotated[float | None, option("Of all GPUs together.")] = None,
    max_perplexity: Annotated[float | None, option("Published or expected.")] = None,
    lineage: Annotated[str | None, option("Whose perplexities. [the benchmark's]")] = None,
    price_per_hour: Annotated[float | None, option("What an hour of one card costs.")] = None,
    validate: Annotated[
        int | None, option("Probe this many of the best here, and order them by what was measured.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> int:
    """The plan to train with, why, and what would change it.

    Exit 3 when nothing fits.
    """
    from effprof.recommender.choice import OBJECTIVES, Limits
    from effprof.recommender.recommend import recommend
    from effprof.report.live import progress

    if objective not in OBJECTIVES:
        raise unknown("--objective", objective, OBJECTIVES)
    space = _space(flags, methods, ranks, vary)
    card, memory = _card(space, max_memory)
    _check(margin, max_hours, min_tokens_per_second, max_perplexity, price_per_hour, validate)
    if validate and space.gpus > 1:
        raise UsageError(
            "--validate has no effect with --gpus: a probe runs one process.", "Leave one out."
        )
    if validate:
        from effprof.trainer.build import check_environment, resolve_device

        if resolve_device(str(space.values.get("device", "cuda"))).type == "cuda":
            check_environment(space.values.get("allocator", "default"))
    if price_per_hour is not None and "tokens" not in space.values:
        raise UsageError(
            "--price-per-hour has no effect without --tokens.", "Add for example --tokens 13.1B."
        )
    if objective == "cost" and price_per_hour is None:
        raise UsageError("--objective cost needs a price.", "Add --price-per-hour 1.99.")
    found = recommend(
        space,
        card,
        Limits(round(memory * (1 - margin)), margin, max_hours, min_tokens_per_second,
               max_perplexity),
        objective=objective,
        price=price_per_hour,
        lineage=_lineage(lineage),
        told=progress("ways to train"),
    )  # fmt: skip
    if price_per_hour is not None and found.best and found.best.estimate.time is None:
        raise UsageError(
            f"--price-per-hour has no effect: {found.best.estimate.time_unknown}.",
            "Leave --price-per-hour out.",
        )
    document = found.as_dict()
    if found.best is not None:
        from effprof.recommender import last

        last.keep(document)
    if validate and found.best is not None:
        return _validated(found, validate, as_json=as_json)
    if as_json:
        print(json.dumps(document))
    else:
        from effprof.report.recommend import show_recommendation

        show_recommendation(found)
    return 0 if found.best is not None else 3


def _space(
    flags: Mapping[str, Any], methods: str | None, ranks: str | None, vary: list[str] | None
) -> Space:
    """The plans that are left open. Raises UsageError for a flag that would do nothing."""
    from effprof import registry
    from effprof.plan import from_dict
    from effprof.recommender.compare import methods_of, ranks_of
    from effprof.recommender.space import Space

    refuse(flags, ("optimizer_impl",), "recommend: the fastest that a method has is taken")
    refuse(flags, ("attention_mask",), "recommend: what it recommends is to be trained here")
    values = plan_values(flags) if methods is None else values_of_methods(flags)
    from_dict(_possible(values))  # its own error first
    if "method" in flags and methods is not None:
        raise UsageError("--method and --methods both name methods.", "Give one of them.")
    if "rank" in values and ranks is not None:
        raise UsageError("--rank and --ranks both name ranks.", "Give one of them.")
    names = [values.pop("method")] if "method" in values else None
    if names is None:
        names = methods_of(methods) if methods else list(registry.names())
    tried: dict[str, list[str]] = {}
    for one in vary or ():
        key, separator, text = one.partition("=")
        if not separator or not text:
            raise UsageError(f"--vary {one!r} is not key=a,b.", "Type --vary refresh=100,200.")
        if key == "rank":
            raise UsageError("--vary rank is --ranks.", f"Type --ranks {text}.")
        if not any(key in registry.setting_fields(registry.method(n).addressed) for n in names):
            raise UsageError(
                f"--vary {key} has no effect: none of these methods has it.",
                "`effprof methods NAME` lists a method's settings.",
            )
        if any(one.startswith(f"{key}=") for one in flags.get("settings", ())):
            raise UsageError(f"--set and --vary both name {key}.", "Give one of them.")
        tried.setdefault(key, []).extend(text.split(","))
    named = methods not in (None, "all") or len(names) == 1
    return Space(values, names, ranks_of(ranks, names) if ranks else (), tried, named)


def _possible(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of the flags those without which a model may not make a plan."""
    return {key: values[key] for key in ("model", "seq_len", "attention") if key in values}


def _card(space: Space, max_memory: str | None) -> tuple[Gpu, int]:
    """The card and the bytes a process may take on it. Raises UsageError, NoDeviceError."""
    from effprof import gpus

    given = parse_bytes(max_memory, "--max-memory") if max_memory else None
    values = space.values
    if values.get("device") == "cpu":
        if given is None:
            from effprof.measure import host

            given = host.available()
        from effprof.plan import from_dict

        plan = from_dict(_possible(values) | {"device": "cpu"})
        return gpus.of(plan).calibrated(), given
    if "gpu" in values:
        return _limited(gpus.gpu(values["gpu"]).calibrated(), given)
    found, free = _here() or (None, None)
    if found is None and given is None:
        raise NoDeviceError(
            "For which card? No GPU is here.", "Add for example --gpu rtx-4090, or --gpu mem=24GB."
        )
    card = found or gpus.Gpu("", "a card of that memory", given or 0)
    return _limited(card.calibrated(), given, free)


def _limited(card: Gpu, given: int | None, free: int | None = None) -> tuple[Gpu, int]:
    """What was given, else what is free, else all. Raises UsageError for more than the card has."""
    if given is not None and given > card.memory:
        raise UsageError(
            f"--max-memory {gib(given)} has no effect: {card.title} has {gib(card.memory)}.",
            "Leave --max-memory out.",
        )
    return card, next(one for one in (given, free, card.memory) if one is not None)


def _here() -> tuple[Gpu, int | None] | None:
    """The first visible card, as the driver sizes it, and its bytes that nobody holds now.

    Raises EffprofError where it is not clear which is the first.
    """
    from effprof import gpus
    from effprof.measure import nvml
    from effprof.measure.visible import first

    with nvml.session() as session:
        if not isinstance(session, nvml.Session):
            return None
        shown = first(session.devices())
        if shown is None or shown.total is None:
            return None
        card = gpus.here(shown.name, shown.total, shown.capability)
        return card._replace(memory=shown.total), session.read(shown.uuid).free


def _lineage(lineage: str | None) -> str:
    from effprof import published

    if lineage and lineage not in published.lineages():
        raise unknown("lineage", lineage, published.lineages())
    return lineage or ""


def _check(margin: float, *limits: float | None) -> None:
    """Raises UsageError for a limit that is none."""
    if not 0 <= margin < 1:
        raise UsageError(f"--margin cannot be {margin:g}.", "Type a share, such as 0.05.")
    names = ("max-hours", "min-tokens-per-second", "max-perplexity", "price-per-hour", "validate")
    for name, value in zip(names, limits, strict=True):
        if value is not None and not 0 < value < 1e12:
            raise UsageError(f"--{name} cannot be {value:g}.", "Type a positive number.")


def _validated(found: Recommendation, wanted: int, *, as_json: bool) -> int:
    """Probe the best of the Pareto set and order them by what was measured."""
    from effprof.recommender import last
    from effprof.recommender.measured import measured
    from effprof.report.recommend import show_measured

    result = measured(found, wanted)
    document = found.as_dict() | {"measured": result.as_dict()}
    if result.best is not None:
        document["plan"] = result.best.choice.estimate.plan.as_dict()
        last.keep(document)
    if as_json:
        print(json.dumps(document))
    else:
        show_measured(found, result)
    return 0 if result.best is not None else 3
