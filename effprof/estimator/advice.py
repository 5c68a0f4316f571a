"""What would lower a plan's memory, with its number: the plan estimated with one change."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from effprof import gpus
from effprof.errors import UsageError
from effprof.estimator.estimate import Estimate
from effprof.estimator.memory import memory
from effprof.fields import flag
from effprof.plan import from_dict
from effprof.step import work_out

_WORTH = 0.02  # of what the process takes: less is not worth a line
_SHOWN = 3
_TRIED = 2  # whatever the time
_TIME = 0.25  # seconds of the whole process after which no more is tried


@dataclass(frozen=True, slots=True)
class Advice:
    """A flag, and the bytes by which the process becomes smaller with it."""

    flag: str
    saving: int


def advise(result: Estimate, seconds: float = _TIME) -> list[Advice]:
    """The changes that save most, the largest first: of the two that fit this peak best, and of as
    many others as the process has time for.
    """
    plan, found = result.plan, []
    card = gpus.gpu(plan.gpu) if plan.gpu else gpus.DEFAULT
    for number, change in enumerate(_changes(result)):
        if number >= _TRIED and time.process_time() > seconds:
            break
        try:
            other = from_dict({**plan.as_dict(), **change})
        except UsageError:  # it does not go with the rest of the plan
            continue
        estimated = memory(work_out(other), card)
        total = estimated.process_total or estimated.peak.size
        saving = result.total - total
        if saving >= _WORTH * result.total:
            found.append(Advice(_spelled(change), saving))
    return sorted(found, key=lambda one: -one.saving)[:_SHOWN]


def _changes(result: Estimate) -> Iterator[dict[str, Any]]:
    """One change at a time: what costs its user nothing and concerns this peak first."""
    plan, peak = result.plan, result.memory.peak
    in_update = peak.phase in ("update", "refresh")
    if plan.keep_logits:
        yield {"keep_logits": False}
    if plan.zero_grad == "zero":
        yield {"zero_grad": "none"}
    if in_update and plan.optimizer_impl != "fused" and plan.state_dtype == "same":
        yield {"optimizer_impl": "fused"}
    if not in_update and plan.attention != "sdpa" and not plan.architecture.eager:
        yield {"attention": "sdpa"}
    if not in_update and plan.loss == "standard":
        yield {"loss": "chunked"}
    if plan.device == "cuda" and plan.allocator == "default":
        yield {"allocator": "expandable"}
    if not in_update and plan.checkpointing == "none":
        yield {"checkpointing": "full"}
    if plan.state_dtype == "same" and not plan.freeze_rest:
        yield {"state_dtype": "8bit", "optimizer_impl": ""}
    if plan.grad_accum == 1 and not plan.per_layer_update and peak.by_role["gradients"]:
        yield {"per_layer_update": True}


def _spelled(change: dict[str, Any]) -> str:
    """As it is typed; what is left out is said so."""
    (name, value), *_ = change.items()
    if value is True:
        return flag(name)
    return f"no {flag(name)}" if value is False else f"{flag(name)} {value}"
