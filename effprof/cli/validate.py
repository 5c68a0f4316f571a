"""effprof validate: plans measured and held against their estimates, within a tolerance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effprof.cli.flags import option, refuse, with_plan_flags
from effprof.cli.probe import checked, here, keep
from effprof.errors import UsageError
from effprof.fields import flag

if TYPE_CHECKING:
    from effprof.prober.compare import Comparison
    from effprof.prober.validate import Validation

NAME = "validate"
EPILOG = """\b
Examples:
  effprof validate --model 9m --method galore --micro-batch 4 --tolerance 0.01
  effprof validate --plans plans.jsonl --tape --json"""


@with_plan_flags
def command(
    flags: Mapping[str, Any],
    plans: Annotated[
        Path | None, typer.Option(help="Plans as .json, .jsonl or .toml ([[plan]]).")
    ] = None,
    last: Annotated[
        bool, typer.Option("--last", help="The plan that was last recommended.")
    ] = False,
    replay: Annotated[
        list[Path] | None,
        typer.Option(help="A recording in place of a run; may be given several times."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Relative error allowed of each measured total.")
    ] = 0.05,
    seconds: Annotated[float | None, option("Seconds to time each plan for, at most. [30]")] = None,
    time_limit: Annotated[float | None, option("Seconds before a probe is stopped. [900]")] = None,
    interval: Annotated[float | None, option("Seconds between two readings. [0.02]")] = None,
    tape: Annotated[
        bool, typer.Option("--tape", help="Name the tensors behind the largest disagreement.")
    ] = False,
    store: Annotated[
        bool | None, option("Keep the measurements of runs. [yes]", "--store/--no-store")
    ] = None,
    calibration: Annotated[
        bool, typer.Option("--calibration/--no-calibration", help="Use what probes measured.")
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> int:
    """Probe each plan and compare bucket by bucket.

    Exit 3 when one is out of tolerance.
    """
    durations = {"seconds": seconds, "time_limit": time_limit, "interval": interval}
    if not 0 < tolerance < 10:
        raise UsageError(
            f"--tolerance cannot be {tolerance:g}.", "Type a relative error, such as 0.05."
        )
    if replay:
        refuse(flags, tuple(flags), "a replay: recordings hold their plans")
        running = {"plans": plans, "last": last or None, "store": store, **durations}
        for name in (name for name, value in running.items() if value is not None):
            raise UsageError(
                f"{flag(name)} has no effect with --replay.", f"Leave {flag(name)} out."
            )
        from effprof.prober.compare import compare
        from effprof.prober.records import replay as read
        from effprof.prober.validate import Validation

        found = [compare(read(path), calibrated=calibration, named=tape) for path in replay]
        return _report(Validation(tuple(found), tolerance), as_json=as_json)
    refuse(flags, ("gpu", "tokens", "attention_mask"), "a validation")
    from effprof.prober.run import Habits
    from effprof.prober.validate import validate

    asked: Any = {name: value for name, value in durations.items() if value is not None}
    habits = checked(Habits(**asked, labelled=tape))
    wanted = _last(flags, plans) if last else _plans(flags, plans)
    number = iter(range(1, len(wanted) + 1))

    def told(result: Comparison, left: float) -> None:
        from effprof.report.terminal import line
        from effprof.units import duration

        kept = keep(result) if store is not False else None
        plan, more = result.plan, f", about {duration(left)} left" if left else ""
        where = f" (measurement {kept})" if kept else ""
        line(f"[{next(number)}/{len(wanted)}{more}] {plan.model} {plan.method}: "
             f"{result.verdict}{where}")  # fmt: skip

    validation = validate(
        wanted, habits, tolerance=tolerance, calibrated=calibration, named=tape, on_result=told
    )
    return _report(validation, as_json=as_json)


def _last(flags: Mapping[str, Any], plans: Path | None) -> list[Any]:
    """The plan of the last recommendation. Raises UsageError, NoDeviceError."""
    refuse(flags, tuple(flags), "--last: the recommendation is whole")
    if plans is not None:
        raise UsageError("--last and --plans both name plans.", "Give one of them.")
    from effprof.recommender import last
    from effprof.trainer.build import resolve_device

    found = last.plan()
    resolve_device(found.device, found.allocator)
    return [found]


def _plans(flags: Mapping[str, Any], plans: Path | None) -> list[Any]:
    if plans is None:
        return [here(flags)]
    refuse(flags, tuple(name for name in flags if name != "device"), "--plans: each line is whole")
    from effprof.cli.flags import default_device
    from effprof.prober.validate import plans_of
    from effprof.trainer.build import check_environment, resolve_device

    found = plans_of(plans, lambda: str(default_device(flags)["device"]))
    for one in found:
        resolve_device(one.device)
        if one.device == "cuda":
            check_environment(one.allocator)
    return found


def _report(validation: Validation, *, as_json: bool) -> int:
    if as_json:
        print(json.dumps(validation.as_dict()))
    else:
        from effprof.report.probe import show_validation

        show_validation(validation.results, validation.tolerance)
    return 0 if validation.passed else 3
