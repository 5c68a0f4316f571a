"""effprof estimate: what a plan needs, without running it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from effprof.cli.flags import plan_from, with_plan_flags

NAME = "estimate"
EPILOG = """\b
Examples:
  effprof estimate --model 1b --method lowrank
  effprof estimate --model 7b --method galore --checkpointing full --gpu rtx-4090 --json"""


@with_plan_flags
def command(
    flags: Mapping[str, Any],
    calibration: Annotated[
        bool, typer.Option("--calibration/--no-calibration", help="Use what probes measured.")
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> int:
    """Memory by role, FLOPs and the cards that fit; exit 3 when --gpu does not fit."""
    from effprof.estimator.estimate import estimate

    result = estimate(plan_from(flags), calibrated=calibration)
    if as_json:
        print(json.dumps(result.as_dict()))
    else:
        from effprof.report.terminal import show_estimate

        show_estimate(result)
    return 3 if result.plan.gpu and not result.fits[0].fits else 0
