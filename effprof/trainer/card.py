"""The model card: what an exported folder says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effprof import __name__ as library
from effprof import registry
from effprof.units import duration, gib, quantity


def card(summary: Mapping[str, Any], steps: int) -> str:
    """README.md of a model, as Hugging Face reads it: front matter, then the run in tables."""
    plan, train, result = summary["plan"], summary["train"], summary["validation"]
    memory, method = summary["memory"], registry.method(plan["method"], plan["update"])
    data = train["data"] or "the sources of Python's standard library"
    named = train["data"] and train["data"].count("/") == 1 and not summary["local"]
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    front += [f"tags: [{library}, {plan['method']}]"]
    front += [f"datasets: [{train['data'].partition(':')[0]}]"] if named else []
    front += [f"base_model: {train['init_from']}"] if train["init_from"] else []
    rows = {
        "model": plan["model"],
        "method": f"{method.facts.title} ({method.facts.paper})",
        "settings": _listed(plan["settings"]),
        "precision": f"{plan['dtype']}, states {plan['state_dtype']}, "
        f"master weights {plan['master_weights']}",
        "rows": f"{plan['global_batch']} × {plan['seq_len']} positions per update, {plan['rows']}",
        "learning rate": f"{train['lr']:g}, {train['schedule']}, {train['warmup']} of warmup",
        "data": data,
        "updates": f"{summary['steps']:,} of {steps:,}",
        "tokens": f"{quantity(summary['tokens'])}, {quantity(summary['real_tokens'])} of them text",
        "time of the last session": duration(summary["seconds"]),
    }
    if result is not None:
        rows["validation loss"] = f"{result['loss']:.4f} over {extent(result)}"
        rows["perplexity"] = f"{result['perplexity']:.2f}"
    rows["memory estimated"] = gib(memory["estimated"])
    rows["memory measured"] = f"{gib(memory['measured_peak'])} ({memory['meter']})"
    table = [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    title = f"# {plan['model'].rstrip('/').rpartition('/')[2]} · {plan['method']}"
    text = [*front, "---", "", title, "", f"Trained by {library}.", "", "| | |", "| --- | --- |"]
    return "\n".join([*text, *table, ""])


def extent(result: Mapping[str, Any]) -> str:
    """What a summary's validation is of: its tokens, and which part of the split they are."""
    batches, split = result["batches"], result["split_batches"]
    tokens = f"{result['tokens']:,} tokens"
    if batches == split:
        return tokens
    if not split:
        return f"{tokens}, the first {batches} micro-batches of the stream"
    return f"{tokens}, the first {batches} of {split} micro-batches of the split"


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
