"""What becomes of each update's numbers: judged, put into metrics.jsonl, shown."""

from __future__ import annotations

from math import isfinite
from typing import Any

from effprof.report.live import LiveLine
from effprof.trainer import guard, metrics
from effprof.trainer.pending import Pending
from effprof.trainer.session import Session
from effprof.trainer.sinks import Sinks


class Ledger:
    """Writes one row per update, and keeps the batches of those that went wrong."""

    def __init__(self, session: Session, live: LiveLine) -> None:
        self.session, self.live = session, live
        self.log = metrics.Log(session.run.out / "metrics.jsonl", writes=session.world.writes)
        start = session.progress.step
        self.sinks = Sinks(session.run, start, live.note) if session.world.writes else None
        self.waited = 0.0  # seconds without data
        self.seconds = 0.0  # of all updates
        self._ready = 0.0  # when the last update's numbers were there

    def read(self, pending: Pending) -> tuple[dict[str, Any], str]:
        """An update's row, and what is wrong with it: ``nan``, ``spike`` or nothing.

        Waits for the device to have the numbers, which it has had since the update after.
        """
        session = self.session
        numbers = pending.read()
        verdict = session.guard.judge(numbers, scaled=session.scaler is not None)
        seconds = pending.ended - max(self._ready, pending.began)
        self._ready = pending.ended
        self.waited += pending.known["data_seconds"]
        self.seconds += seconds
        positions = session.plan.global_batch * session.plan.seq_len
        row = {
            **pending.known,
            **numbers,
            "tokens_per_second": positions / seconds,
            "seconds": seconds,
            "memory": session.machine.now(),
            "memory_peak": session.machine.peak(),
            "mfu": session.machine.mfu(
                session.expected.flops.dense_equivalent / seconds / session.world.size
            ),
        }
        if verdict:
            row["verdict"] = verdict
            self._keep(pending, row, verdict)
        return row, verdict

    def _keep(self, pending: Pending, row: dict[str, Any], verdict: str) -> None:
        """Record what an update went wrong on, and say so."""
        session = self.session
        if session.world.writes:
            names = ("loss", "grad_norm", "lr", "tokens")
            numbers = {n: row[n] for n in names if row.get(n) is not None and isfinite(row[n])}
            numbers["draw"] = pending.draw
            path = guard.record(session.run.out, row["step"], verdict, numbers, pending.batches)
            what = "no number" if verdict == "nan" else "far above the last ones"
            self.live.note(f"step {row['step']}: loss {row['loss']:.4g} is {what}; batch in {path}")

    def write(self, row: dict[str, Any]) -> None:
        """Append a row, and show it."""
        if self.session.world.writes:
            self.log.append(row)
            self.live.show(row)
        if self.sinks is not None:
            self.sinks.log(row)

    def close(self) -> None:
        if self.sinks is not None:
            self.sinks.close()
