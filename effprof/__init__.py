"""effprof: what fits, what it is worth, does reality agree, and then train.

The public names load what they need on first use; importing effprof itself imports nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effprof.errors import EffprofError as EffprofError
    from effprof.estimator.estimate import estimate as estimate
    from effprof.plan import Plan as Plan
    from effprof.tracer.trace import trace as trace
    from effprof.trainer.apply import apply as apply
    from effprof.trainer.apply import optimizer as optimizer
    from effprof.trainer.build import build as build
    from effprof.trainer.export import load as load

_PUBLIC = {
    "EffprofError": "effprof.errors",
    "Plan": "effprof.plan",
    "apply": "effprof.trainer.apply",
    "optimizer": "effprof.trainer.apply",
    "estimate": "effprof.estimator.estimate",
    "trace": "effprof.tracer.trace",
    "build": "effprof.trainer.build",
    "load": "effprof.trainer.export",
}

__all__ = ["EffprofError", "Plan", "apply", "build", "estimate", "load", "optimizer", "trace"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'effprof' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(_PUBLIC)
