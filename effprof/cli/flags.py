"""The flags that every command about a plan shares, written once."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from effprof.errors import UsageError
from effprof.plan import Plan, from_dict
from effprof.units import parse_count


def _option(help_text: str, *names: str) -> Any:
    return typer.Option(*names, help=help_text, show_default=False)


def _plan_flags(
    model: Annotated[
        str | None,
        _option("Preset (60m, 1b, qwen2-0.5b …) or path of a config.json.", "--model", "-m"),
    ] = None,
    method: Annotated[str | None, _option("Method; `effprof methods` lists them. [full]")] = None,
    update: Annotated[str | None, _option("Another method's update half.")] = None,
    rank: Annotated[int | None, _option("Rank. [published for this size, else hidden / 4]")] = None,
    settings: Annotated[
        list[str] | None, _option("A method's setting, key=value; update.key=value.", "--set")
    ] = None,
    micro_batch: Annotated[int | None, _option("Rows per forward. [16]")] = None,
    seq_len: Annotated[int | None, _option("Positions per row. [256]")] = None,
    grad_accum: Annotated[int | None, _option("Micro-batches per update. [1]")] = None,
    global_batch: Annotated[int | None, _option("Rows per update over all GPUs.")] = None,
    dtype: Annotated[str | None, _option("bf16, amp-bf16, amp-fp16 or fp32. [bf16]")] = None,
    state_dtype: Annotated[str | None, _option("Optimizer states: same or fp32. [same]")] = None,
    master_weights: Annotated[str | None, _option("none. [none]")] = None,
    checkpointing: Annotated[
        str | None, _option("Activation checkpointing: none or full. [none]")
    ] = None,
    attention: Annotated[str | None, _option("sdpa, eager or math. [sdpa]")] = None,
    attention_mask: Annotated[str | None, _option("none. [none]")] = None,
    loss: Annotated[str | None, _option("standard. [standard]")] = None,
    rows: Annotated[str | None, _option("packed, packed-isolated or padded. [packed]")] = None,
    per_layer_update: Annotated[
        bool | None, _option("Not in this version.", "--per-layer-update")
    ] = None,
    zero_grad: Annotated[
        str | None, _option("Gradients after an update: none or zero. [none]")
    ] = None,
    optimizer_impl: Annotated[str | None, _option("AdamW: fused, foreach or loop. [fused]")] = None,
    keep_logits: Annotated[
        bool | None, _option("The loop keeps the model's output through backward.", "--keep-logits")
    ] = None,
    targets: Annotated[str | None, _option("Matrices the method takes. [attention,mlp]")] = None,
    freeze_rest: Annotated[
        bool | None, _option("Train the targeted matrices only.", "--freeze-rest")
    ] = None,
    compile: Annotated[bool | None, _option("torch.compile the model.", "--compile")] = None,
    allocator: Annotated[
        str | None, _option("CUDA allocator: default or expandable. [default]")
    ] = None,
    device: Annotated[str | None, _option("cuda or cpu.")] = None,
    gpu: Annotated[str | None, _option("A card's name, or mem=24GB.")] = None,
    gpus: Annotated[int | None, _option("Number of GPUs. [1]")] = None,
    parallel: Annotated[str | None, _option("none. [none]")] = None,
    tokens: Annotated[str | None, _option("Positions of the whole run, such as 13.1B.")] = None,
    config: Annotated[Path | None, _option("A run.toml with these names.")] = None,
) -> None: ...


def with_plan_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the plan's flags; it receives them first, as ``flags``: name -> value,
    unset ones left out.
    """
    own = inspect.signature(command)
    shared = inspect.signature(_plan_flags)

    def wrapper(**values: Any) -> Any:
        flags = {name: values.pop(name) for name in shared.parameters}
        return command({k: v for k, v in flags.items() if v is not None}, **values)

    hints = typing.get_type_hints(_plan_flags, include_extras=True)
    hints |= typing.get_type_hints(command, include_extras=True)
    del hints["flags"]
    parameters = [*shared.parameters.values(), *list(own.parameters.values())[1:]]
    wrapper.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [one.replace(annotation=hints[one.name]) for one in parameters]
    )
    wrapper.__annotations__ = hints
    wrapper.__doc__ = command.__doc__
    return wrapper


def plan_values(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags as a plan's fields, over those of ``--config``. Raises UsageError."""
    values = dict(flags)
    path = values.pop("config", None)
    text = values.pop("settings", [])
    if "tokens" in values:
        values["tokens"] = parse_count(values["tokens"], "--tokens")
    if "targets" in values:
        values["targets"] = tuple(part.strip() for part in values["targets"].split(","))
    base = read_table(path, "plan") if path else {}
    if base and {"method", "update"} & values.keys():
        base = {
            k: v
            for k, v in base.items()
            if k not in ("settings", "update_settings", "rank", "update")
        }
    for one in text:
        key, separator, value = one.partition("=")
        if not separator or not value:
            raise UsageError(
                f"--set {one!r} is not key=value.", "Type for example --set refresh=100."
            )
        where = "update_settings" if key.startswith("update.") else "settings"
        values.setdefault(where, {})[key.removeprefix("update.")] = value
    for where in ("settings", "update_settings"):
        if where in base:
            values[where] = {**base[where], **values.get(where, {})}
    if "rank" in values and "settings" in base:
        values["settings"]["rank"] = values["rank"]
    return {**base, **values}


def plan_from(flags: Mapping[str, Any]) -> Plan:
    """The plan of a command line. Raises UsageError."""
    return from_dict(plan_values(flags))


def default_device(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags with the device that is here, where none was asked for: a run cannot use another."""
    if "device" in flags or "config" in flags:
        return dict(flags)
    import torch

    return {**flags, "device": "cuda" if torch.cuda.is_available() else "cpu"}


def read_table(path: Path, name: str) -> dict[str, Any]:
    """One table of a run.toml; a file without tables is its plan. Raises UsageError."""
    import tomllib

    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise UsageError(
            f"Cannot read {str(path)!r}: {problem.strerror}.", "Give a run.toml."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise UsageError(f"{str(path)!r} is not TOML: {problem}.", "Give a run.toml.") from None
    unknown_tables = document.keys() - {"plan", "train"}
    if "plan" not in document and "train" not in document:
        document, unknown_tables = {"plan": document}, set()
    if unknown_tables:
        raise UsageError(
            f"{str(path)!r} has an unknown table [{sorted(unknown_tables)[0]}].",
            "Known: [plan] and [train].",
        )
    return dict(document.get(name, {}))
