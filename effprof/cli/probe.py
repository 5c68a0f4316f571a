"""effprof probe: a short real run, held against the estimate; and the measurements kept so far."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effprof.cli.flags import default_device, plan_from, refuse, with_plan_flags
from effprof.errors import UsageError
from effprof.units import parse_bytes

if TYPE_CHECKING:
    from effprof.plan import Plan
    from effprof.prober.compare import Comparison
    from effprof.prober.run import Habits

NAME = "probe"
EPILOG = """\b
Examples:
  effprof probe --model 9m --method galore --micro-batch 4
  effprof probe --model 1b --method sltrain --device cuda --find max-batch"""
_FORMATS = ("csv", "parquet")


@with_plan_flags
def command(
    flags: Mapping[str, Any],
    seconds: Annotated[
        float, typer.Option(help="Seconds to time steady updates for, at most.")
    ] = 30.0,
    time_limit: Annotated[float, typer.Option(help="Seconds before the probe is stopped.")] = 900.0,
    interval: Annotated[float, typer.Option(help="Seconds between two readings of NVML.")] = 0.02,
    tape: Annotated[
        bool, typer.Option("--tape", help="Name the tensors behind the largest disagreement.")
    ] = False,
    find: Annotated[
        str | None, typer.Option(help="max-batch: the largest that really runs.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="With --find: use no more than this, such as 20GB.")
    ] = None,
    margin: Annotated[float, typer.Option(help="Share of the memory to keep back.")] = 0.05,
    record: Annotated[Path | None, typer.Option(help="Keep the raw records in a file.")] = None,
    replay: Annotated[
        Path | None, typer.Option(help="A recording in place of a run; no device is needed.")
    ] = None,
    store: Annotated[
        bool | None,
        typer.Option(
            "--store/--no-store",
            help="Keep the measurement. [a run: yes, a replay: no]",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        bool, typer.Option("--calibration/--no-calibration", help="Use what probes measured.")
    ] = True,
    listed: Annotated[bool, typer.Option("--list", help="The measurements kept.")] = False,
    show: Annotated[int | None, typer.Option(help="One measurement, whole, as JSON.")] = None,
    export: Annotated[str | None, typer.Option(help="All measurements as csv or parquet.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where --export writes.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> int:
    """Run the plan's step for real in a process of its own and compare.

    Exit 3 when memory runs out.
    """
    if listed or show is not None or export:
        refuse(flags, tuple(flags), "--list, --show and --export")
        return _kept(listed=listed, show=show, export=export, out=out, as_json=as_json)
    if out is not None:
        raise UsageError("--out has no effect without --export.", "Add --export csv.")
    if replay is not None:
        refuse(flags, tuple(flags), "a replay: the recording holds its plan")
        if record is not None or find:
            raise UsageError("--replay runs nothing to record or find.", "Leave one of them out.")
        from effprof.prober.compare import compare
        from effprof.prober.records import replay as read

        result = compare(read(replay), calibrated=calibration, named=tape, margin=margin)
        return _report(result, store=bool(store), as_json=as_json)
    refuse(flags, ("gpu", "tokens", "attention_mask"), "a probe")
    from effprof.prober.run import Habits

    habits = checked(Habits(seconds, time_limit, interval, labelled=tape))
    plan = here(flags)
    if find is not None:
        if find != "max-batch":
            raise UsageError(f"--find {find!r} is not known.", "Type --find max-batch.")
        if record is not None or store or tape:
            raise UsageError(
                "--find keeps only its answer: --record, --store and --tape have no effect.",
                "Probe the answer with them.",
            )
        return _find(plan, habits, margin=margin, max_memory=max_memory, as_json=as_json)
    if max_memory is not None:
        raise UsageError("--max-memory has no effect without --find.", "Add --find max-batch.")

    from effprof.prober.compare import compare
    from effprof.prober.run import probe

    result = compare(
        probe(plan, habits, record=record), calibrated=calibration, named=tape, margin=margin
    )
    return _report(result, store=store is not False, as_json=as_json)


def checked(habits: Habits) -> Habits:
    """Raises UsageError for a duration that cannot be."""
    if not 0 < habits.time_limit < 1e6:
        raise UsageError(
            f"--time-limit cannot be {habits.time_limit}.", "Type seconds, such as 900."
        )
    if not 0 <= habits.seconds < habits.time_limit:
        raise UsageError(
            f"--seconds cannot be {habits.seconds}.",
            f"Type 30, or less than --time-limit {habits.time_limit}.",
        )
    from effprof.measure.sampler import check_interval

    check_interval(habits.interval)
    return habits


def here(flags: Mapping[str, Any]) -> Plan:
    """The plan of the flags on the device that is here. Raises NoDeviceError where it is not."""
    plan = plan_from(default_device(flags))

    from effprof.trainer.build import resolve_device

    resolve_device(plan.device)
    return plan


def keep(result: Comparison) -> int | None:
    """Store a measurement; where that fails people are told, and it is still shown."""
    from effprof.errors import EffprofError
    from effprof.measure import store
    from effprof.report.terminal import line

    if not result.probe.taken:
        return None  # it never began
    try:
        return store.add(result.as_dict())
    except EffprofError as problem:
        line(f"Warning: {problem.message} The measurement is not kept. {problem.hint}")
        return None


def _report(result: Comparison, *, store: bool, as_json: bool) -> int:
    number = keep(result) if store else None
    if as_json:
        print(json.dumps(result.as_dict() | {"id": number}))
    else:
        from effprof.report.probe import show_probe

        show_probe(result, number)
    return {"ok": 0, "oom": 3}.get(result.probe.outcome, 1)


def _find(
    plan: Plan, habits: Habits, *, margin: float, max_memory: str | None, as_json: bool
) -> int:
    from effprof.prober.find import Trial
    from effprof.prober.find import find as search
    from effprof.report.terminal import line
    from effprof.units import gib

    available = free_memory(plan)
    if max_memory is not None:
        available = min(available, parse_bytes(max_memory, "--max-memory"))

    def told(trial: Trial) -> None:
        need = "out of memory" if trial.need is None else gib(trial.need)
        line(f"micro-batch {trial.micro_batch}: {need}, {'fits' if trial.fits else 'too much'}")

    found = search(plan, habits, available=available, margin=margin, on_trial=told)
    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        from effprof.report.probe import show_found

        show_found(found)
    return 0 if found.micro_batch else 3


def free_memory(plan: Plan) -> int:
    """Bytes free on the plan's device now."""
    if plan.device == "cpu":
        from effprof.measure import host

        return host.available()
    import torch

    return int(torch.cuda.mem_get_info()[0])


def _kept(
    *, listed: bool, show: int | None, export: str | None, out: Path | None, as_json: bool
) -> int:
    """The measurements kept so far."""
    if bool(listed) + (show is not None) + bool(export) > 1:
        raise UsageError("--list, --show and --export are three commands.", "Give one of them.")
    if export and export not in _FORMATS:
        from effprof.errors import unknown

        raise unknown("--export format", export, _FORMATS)
    from effprof.measure import store

    if show is not None:
        print(json.dumps(store.one(show), indent=None if as_json else 2))
        return 0
    table = store.table()
    if export:
        return _export(table, export, out)
    if as_json:
        print(table.drop(columns="config").to_json(orient="records"))
    else:
        from effprof.report.probe import show_measurements

        show_measurements(table, str(store.path()))
    return 0


def _export(table: Any, kind: str, out: Path | None) -> int:
    from effprof.files import write_whole

    if kind == "csv":
        text = table.to_csv(index=False)
        if out is None:
            print(text, end="")
            return 0
        write_whole(out, text)
    elif out is None:
        raise UsageError("A parquet file cannot be printed.", "Add --out measurements.parquet.")
    else:
        write_whole(out, table.to_parquet(index=False))
    from effprof.report.terminal import line

    line(f"{len(table)} measurements in {out}")
    return 0
