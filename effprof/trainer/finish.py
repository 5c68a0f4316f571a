"""How a run ends: its summary, the exported model, and how to go on."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effprof.files import write_whole
from effprof.trainer.adapter import export_adapter, has_adapter
from effprof.trainer.card import card
from effprof.trainer.evaluate import Validation
from effprof.trainer.export import export, has_dense_form, load
from effprof.trainer.session import Session

if TYPE_CHECKING:
    from effprof.trainer.loop import Loop


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``exit_code`` 0, or 130 / 143 after a signal, with a checkpoint written."""

    exit_code: int
    summary: dict[str, Any]


def outcome(loop: Loop, result: Validation | None) -> Outcome:
    """Write the model and the summary of a run that has come to its end; report any other."""
    session, out = loop.session, loop.run.out
    summary = _summary(loop, result)
    if result is None:
        return Outcome(loop.stop.code, summary)
    if session.world.writes:
        # Shards are put together from the checkpoint, on the host.
        model = load(out) if session.plan.parallel == "fsdp" else session.model
        if has_dense_form(model):
            told = card(summary, loop.run.steps)
            export(model, session.tokenizer, session.plan, out / "model", told)
        if loop.run.init_from and has_adapter(session.plan):
            export_adapter(session.model, session.plan, loop.run.init_from, out / "adapter")
        write_whole(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    return Outcome(0, summary)


def cut_short(code: int, session: Session, path: Path) -> str:
    """What to tell of a run that is not at its end."""
    why = "Interrupted" if code else "Time is up"
    return (
        f"{why} at step {session.progress.step}; checkpoint {path}. "
        f"Go on with the same command and --out {session.run.out} --resume."
    )


def _summary(loop: Loop, result: Validation | None) -> dict[str, Any]:
    session, ledger = loop.session, loop.ledger
    progress = session.progress
    return {
        "schema": "effprof.train/1",
        "out": str(loop.run.out),
        "plan": session.plan.as_dict(),
        "train": loop.run.table(),
        "steps": progress.step,
        "tokens": progress.tokens,
        "real_tokens": progress.real_tokens,
        "seconds": time.monotonic() - loop.began,
        "resumed_at": loop.resumed_at,
        "data_wait": ledger.waited / ledger.seconds if ledger.seconds else 0.0,
        "local": loop.run.data is None or session.local,
        "memory": {
            "estimated": session.expected.total,
            "measured_peak": session.machine.peak(),
            "meter": session.machine.name,
        },
        "validation": None
        if result is None
        else {
            "loss": result.loss,
            "perplexity": result.perplexity,
            "lineage_loss": result.lineage_loss,
            "tokens": result.tokens,
            "batches": result.batches,
            "split_batches": result.split,
        },
    }
