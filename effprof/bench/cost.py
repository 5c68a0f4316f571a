"""What a comparison will take, before it begins: runs, positions, hours per card."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from effprof import gpus
from effprof.bench.spec import Spec
from effprof.estimator.estimate import estimate
from effprof.trainer.run import make


def costs(spec: Spec, gpu: str | None = None) -> dict[str, Any]:
    """Trials, positions of all of them, and per card (``gpu`` or the common ones) the hours of
    the whole comparison: None where a trial does not fit, or nothing is known of the card's time.
    """
    positions = [_positions(spec, index) for index in range(len(spec.arms))]
    each = spec.trials + spec.seeds - 1
    found: dict[str, Any] = {
        "trials": spec.total,
        "positions": each * sum(positions),
        "positions_per_trial": max(positions),
    }
    plans = [arm.plan for arm in spec.arms]
    if any(plan.device == "cpu" for plan in plans):
        return {**found, "hours": {}}
    hours: dict[str, float | None] = {}
    for name in [gpu] if gpu else [card.name for card in gpus.common()]:
        seconds = [
            _seconds(dataclasses.replace(plan, gpu=name), count)
            for plan, count in zip(plans, positions, strict=True)
        ]
        known = [one for one in seconds if one is not None]
        hours[name] = each * sum(known) / 3600 if len(known) == len(seconds) else None
    return {**found, "hours": hours}


def _positions(spec: Spec, index: int) -> int:
    from pathlib import Path

    plan = spec.arms[index].plan
    train: Mapping[str, Any] = {**spec.train, "lr": 1.0}
    return make(plan, Path(), train).steps * plan.global_batch * plan.seq_len


def _seconds(plan: Any, positions: int) -> float | None:
    """A trial's seconds on the plan's card, if it fits and its time is known."""
    found = estimate(plan)
    if found.time is None or (found.fits and not found.fits[0].fits):
        return None
    return positions / found.time.positions * found.time.update
