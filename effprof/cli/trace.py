"""effprof trace: a plan's real step under fake tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from effprof.cli.flags import plan_values, with_plan_flags
from effprof.errors import UsageError
from effprof.plan import from_dict

NAME = "trace"
EPILOG = """\b
Examples:
  effprof trace --model 1b --method galore --png step.png
  effprof trace --diff runs/a/run.toml runs/b/run.toml"""


@with_plan_flags
def command(
    flags: Mapping[str, Any],
    png: Annotated[Path | None, typer.Option(help="Draw the timeline by role.")] = None,
    html: Annotated[Path | None, typer.Option(help="The timeline as a page to hover over.")] = None,
    snapshot: Annotated[
        Path | None, typer.Option(help="Write a snapshot for PyTorch's memory_viz.")
    ] = None,
    diff: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Two plans (run.toml, or JSON of --json): what changed.", metavar="A B"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> int:
    """Memory tensor by tensor, from the real code without a GPU.

    Exit 3 when it does not fit --gpu.
    """
    if diff:
        _refuse_with_diff({"--png": png, "--html": html, "--snapshot": snapshot}, flags)
        return _difference(diff, as_json=as_json)
    from effprof.estimator.estimate import estimate
    from effprof.report.live import progress
    from effprof.report.timeline import timeline
    from effprof.tracer.foreign import admit_config
    from effprof.tracer.trace import trace

    _check_files([path for path in (png, html, snapshot) if path])
    values = plan_values(flags)
    if isinstance(values.get("model"), str):
        admit_config(values["model"])
    plan = from_dict(values)
    expected = None if plan.architecture.foreign or as_json else estimate(plan)
    result = trace(plan, on_update=progress("traced updates"))
    shown = timeline(plan, result.memory)
    document = result.as_dict() | {"timeline": shown.as_dict()}
    if png or html:
        from effprof.report.page import write_page
        from effprof.report.pages import page_of
        from effprof.report.plots import draw
        from effprof.report.subject import Subject

        if png:
            draw(png, shown)
        if html:
            write_page(html, page_of([Subject(plan.model, document)]))
    if snapshot:
        from effprof.snapshot import write

        write(snapshot, result.tape, plan.allocator)
    if as_json:
        print(json.dumps(document))
    else:
        from effprof.report.trace import show_trace

        show_trace(result, expected)
    return 3 if plan.gpu and not result.fits[0].fits else 0


def _check_files(paths: list[Path]) -> None:
    """Raise UsageError for files that cannot be written: before a trace, not after."""
    for place, path in enumerate(paths):
        if path.is_dir() or not path.resolve().parent.is_dir():
            raise UsageError(f"Cannot write {str(path)!r}.", "Give a file in a folder that exists.")
        if path in paths[:place]:
            raise UsageError(f"{str(path)!r} is given twice.", "Give each picture its own file.")


def _refuse_with_diff(files: Mapping[str, Path | None], flags: Mapping[str, Any]) -> None:
    """Raise UsageError for what would do nothing beside --diff."""
    given = [name for name, path in files.items() if path]
    given += [f"--{name.replace('_', '-')}" for name in flags]
    if given:
        raise UsageError(
            f"{', '.join(given)} has no effect with --diff, which reads both plans from files.",
            "Leave it out, or change the files.",
        )


def _difference(paths: tuple[Path, Path], *, as_json: bool) -> int:
    from effprof import readers
    from effprof.cli.flags import read_plan
    from effprof.report.live import progress
    from effprof.tracer.trace import trace

    one, other = (trace(read_plan(path), on_update=progress(path.name)) for path in paths)
    peaks = one.memory.peak, other.memory.peak
    found = readers.diff(*peaks)
    if as_json:
        changes = [
            {"role": c.role, "label": c.label, "before": c.before, "after": c.after} for c in found
        ]
        sides = {"before": one.as_dict(), "after": other.as_dict()}
        print(json.dumps({"schema": "effprof.trace-diff/1", **sides, "changes": changes}))
        return 0
    from effprof.report.trace import show_difference

    names = [p.stem if p.stem != "run" else p.resolve().parent.name for p in paths]
    if names[0] == names[1]:
        names = ["A", "B"]
    show_difference((names[0], names[1]), peaks, found)
    return 0
