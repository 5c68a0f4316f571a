"""effprof probe: a short real run, held against the estimate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from effprof.cli.flags import default_device, plan_from, refuse, with_plan_flags
from effprof.errors import UsageError

NAME = "probe"
EPILOG = """\b
Examples:
  effprof probe --model 9m --method galore --micro-batch 4
  effprof probe --model 1b --method sltrain --device cuda --json"""


@with_plan_flags
def command(
    flags: Mapping[str, Any],
    seconds: Annotated[float, typer.Option(help="Seconds to time steady updates for.")] = 10.0,
    time_limit: Annotated[float, typer.Option(help="Seconds before the probe is stopped.")] = 900.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> int:
    """Run the plan's step for real in a process of its own and compare.

    Exit 3 when memory runs out.
    """
    refuse(flags, ("gpu", "tokens", "attention_mask"), "a probe")
    if not 0 < time_limit < 1e6:
        raise UsageError(f"--time-limit cannot be {time_limit}.", "Type seconds, such as 900.")
    if not 0 <= seconds < time_limit:
        raise UsageError(
            f"--seconds cannot be {seconds}.", f"Type 10, or less than --time-limit {time_limit}."
        )
    plan = plan_from(default_device(flags))

    from effprof.trainer.build import resolve_device

    resolve_device(plan.device)

    from effprof.estimator.compare import compare
    from effprof.trainer.probe import probe

    result = compare(probe(plan, seconds=seconds, time_limit=time_limit))
    if as_json:
        print(json.dumps(result.as_dict()))
    else:
        from effprof.report.terminal import show_probe

        show_probe(result)
    return {"ok": 0, "oom": 3}.get(result.outcome, 1)
