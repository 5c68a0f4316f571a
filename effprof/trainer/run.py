"""A run: what `effprof train` is asked for, checked before anything starts."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effprof.errors import UsageError, unknown
from effprof.plan import Plan, from_dict, nearest_size
from effprof.trainer import checkpoint, schedule
from effprof.trainer.files import to_toml, write_whole


@dataclass(frozen=True)
class Run:
    """One training run. ``steps`` are optimizer updates; ``lr`` is the peak; ``clip`` 0 is off.

    ``save_every`` and ``eval_every`` 0 mean only at the end.
    """

    plan: Plan
    out: Path
    steps: int
    lr: float
    warmup: int
    schedule: str = "cosine"
    clip: float = 0.0
    seed: int = 0
    data: str | None = None
    tokenizer: str | None = None
    save_every: int = 0
    eval_every: int = 0

    def table(self) -> dict[str, Any]:
        """The ``[train]`` table of run.toml."""
        fields = dataclasses.asdict(dataclasses.replace(self, plan=None))  # type: ignore[arg-type]
        return {k: v for k, v in fields.items() if k not in ("plan", "out")}

    def write(self) -> None:
        """Write run.toml into the run's folder."""
        tables = {"plan": self.plan.as_dict(), "train": self.table()}
        header = "# Written by effprof train; `effprof train --config` reads it.\n"
        write_whole(self.out / "run.toml", header + to_toml(tables))


def make(plan: Plan, out: Path, given: Mapping[str, Any]) -> Run:
    """A run from flags; unset ones take their defaults. Raises UsageError for a value that
    cannot be.
    """
    values = {key: value for key, value in given.items() if value is not None}
    per_update = plan.global_batch * plan.seq_len
    steps = values.pop("steps", None)
    if plan.tokens:
        by_tokens = -(-plan.tokens // per_update)
        if steps not in (None, by_tokens):
            raise UsageError(
                f"--steps {steps} disagrees with --tokens {plan.tokens}, which are {by_tokens} "
                f"updates.",
                "Give one of them.",
            )
        steps = by_tokens
    if steps is None:
        raise UsageError("How long should it train?", "Type --steps 1000 or --tokens 100M.")
    lr = values.pop("lr", None) or default_lr(plan)
    warmup = values.pop("warmup", None)
    run = Run(plan, out, steps, lr, steps // 10 if warmup is None else warmup, **values)
    for name in ("steps", "lr"):
        if getattr(run, name) <= 0:
            raise UsageError(
                f"--{name} must be positive, not {getattr(run, name)}.", f"Type --{name} 100."
            )
    for name in ("warmup", "clip", "save_every", "eval_every", "seed"):
        if getattr(run, name) < 0:
            raise UsageError(
                f"--{name.replace('_', '-')} must not be negative, not {getattr(run, name)}.",
                "Type 0 to turn it off.",
            )
    if run.warmup > run.steps:
        raise UsageError(
            f"--warmup {run.warmup} is longer than the run of {run.steps} steps.",
            f"Type --warmup {run.steps // 10}.",
        )
    if run.schedule not in schedule.NAMES:
        raise unknown("--schedule", run.schedule, schedule.NAMES)
    return run


def default_lr(plan: Plan) -> float:
    """The learning rate published for the nearest size, by the half that sets it."""
    rates = plan.halves.facts.lr or plan.halves.update.FACTS.lr
    return rates[nearest_size(tuple(rates), plan.architecture)]


def open_folder(run: Run, *, resume: bool) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, if any. Never overwrites: a used folder without --resume is
    refused.
    """
    used = run.out.exists() and (not run.out.is_dir() or any(run.out.iterdir()))
    if not used:
        return None
    if not resume:
        raise UsageError(
            f"The folder {str(run.out)!r} is not empty.",
            "Add --resume to go on, or give another --out.",
        )
    _check_same(run)
    return checkpoint.newest(run.out, _say_damaged)


def _say_damaged(path: Path) -> None:
    sys.stderr.write(f"Warning: {path} is damaged and was passed over.\n")


def _check_same(run: Run) -> None:
    """A resumed run must be the run that was: only its length's bookkeeping may change."""
    import tomllib

    path = run.out / "run.toml"
    if not path.exists():
        return
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    before, now = from_dict(table["plan"]), run.plan
    if before != now:
        old, new = before.as_dict(), now.as_dict()
        key = next(name for name in old if old[name] != new[name])
        raise UsageError(
            f"{str(run.out)!r} was started with {key} = {old[key]!r}, not {new[key]!r}.",
            f"Resume with --config {path}, or give another --out.",
        )
    train, wanted = table["train"], run.table()
    for key in ("steps", "lr", "warmup", "schedule", "clip", "seed", "data", "tokenizer"):
        if train.get(key) != wanted[key]:
            raise UsageError(
                f"{str(run.out)!r} was started with {key} = {train.get(key)!r}, not "
                f"{wanted[key]!r}.",
                f"Resume with --config {path}, or give another --out.",
            )
