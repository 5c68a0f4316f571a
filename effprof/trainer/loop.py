"""Training in full: one update after another, until the last, a signal, or the time is up."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from effprof.errors import EffprofError
from effprof.report.live import LiveLine
from effprof.trainer import checkpoint, finish, preflight
from effprof.trainer.batches import StreamBatches
from effprof.trainer.distributed import whole
from effprof.trainer.evaluate import Validation, evaluate
from effprof.trainer.finish import Outcome
from effprof.trainer.folder import check_place, open_folder, say_damaged
from effprof.trainer.launch import world
from effprof.trainer.ledger import Ledger
from effprof.trainer.lock import held
from effprof.trainer.norms import UpdateNorm, gradient_norm
from effprof.trainer.pending import Pending
from effprof.trainer.run import Run
from effprof.trainer.saver import Saver
from effprof.trainer.session import Session
from effprof.trainer.step import training_step
from effprof.trainer.stop import SharedStop, Stop

EVAL_BATCHES = 64  # of the validation split during a run, and of a stream's at its end
_TRIES = {"stop": 0, "skip": 10, "rollback": 3}  # in a row, before a run gives up


def train(run: Run, *, resume: bool = False, force: bool = False) -> Outcome:
    """Train a run to its end, to a signal, or until its time is up.

    Raises EffprofError; nothing already written is lost.
    """
    here = world()
    check_place(run.out)
    with (
        SharedStop(run.time_limit or None, here)
        if here.size > 1
        else Stop(run.time_limit or None) as stop,
        held(run.out) if here.writes else contextlib.nullcontext(),
    ):
        found = open_folder(run, resume=resume)
        at = found[1]["step"] if found else -1
        most, least = here.most(at, -at)  # nobody writes before all have looked
        if most != -least:
            raise EffprofError(
                f"The processes do not see the same checkpoints in {str(run.out)!r}.",
                "Give an --out that every machine shares.",
            )
        ready = preflight.prepare(run, force=force)
        session = Session(
            *(run, ready.device, ready.expected, ready.machine),
            found=found[1] if found else None,
            check=stop.check,
        )
        if found:
            session.restore(*found)
            if here.writes:
                checkpoint.set_aside(run.out, session.progress.step)
        loop = Loop(session, stop, resumed=found is not None)
        try:
            return loop.go()
        finally:
            loop.close()


class Loop:
    """Updates, and what happens between them: metrics, validation, checkpoints."""

    def __init__(self, session: Session, stop: Stop, *, resumed: bool) -> None:
        self.session, self.stop, self.run = session, stop, session.run
        run, start = self.run, session.progress.step
        self.live = LiveLine(run.steps, start, session.expected.total)
        self.ledger = Ledger(session, self.live)
        self.ledger.log.cut(start)
        self.saver = Saver(run.out, run.keep, session.device, sharded=run.plan.parallel == "fsdp")
        self.began = time.monotonic()
        self.resumed_at = start if resumed else None
        self.saved_at = self.resumed_at
        self.pending: Pending | None = None
        self.update_norm = UpdateNorm(session.model.parameters()) if run.log_norms else None
        self.numbers: dict[str, Tensor] = {}
        self.longest = 0.0  # seconds from one update to the next
        self.tries = 0

    def go(self) -> Outcome:
        """Update until something ends the run, then evaluate, save and export."""
        session, run = self.session, self.run
        with self.ledger.log, self.live:
            if self.resumed_at is not None:
                self.live.note(f"Resumed at step {self.resumed_at}.")
            elif run.on_nan == "rollback":
                self.save()  # something to go back to
            while self.unfinished() and self.stop.go_on(
                session.ready, self.longest + self.saver.seconds
            ):
                began = time.monotonic()
                before, self.pending = self.pending, self.update()
                self.settle(before)
                self.between()
                self.longest = max(self.longest, time.monotonic() - began)
            path = self.save()
            self.saver.wait()
            result = None
            if not self.unfinished() and not self.stop.wanted():
                self.live.note("Validating and writing the model …")
                result = self.validate(self.run.last_batches)
            if result is None:
                self.live.note(finish.cut_short(self.stop.code, session, path))
            elif not math.isfinite(result.loss):
                raise self.diverged(f"The last validation's loss is {result.loss}.")
        return finish.outcome(self, result)

    def unfinished(self) -> bool:
        """Whether updates are left. Before the last is counted its numbers are looked at."""
        if self.session.progress.step < self.run.steps:
            return True
        self.settle_all()  # which may go back
        return self.session.progress.step < self.run.steps

    def update(self) -> Pending:
        """One optimizer update. Nothing in it waits for the device."""
        session, began = self.session, time.perf_counter()
        lr = session.set_lr()
        drawn = session.next_batches()
        if self.update_norm is not None:
            self.update_norm.begin()
        loss = training_step(
            session.model,
            session.optimizer,
            drawn.batches,
            session.plan,
            before_update=self.before_update,
            scaler=session.scaler,
            engine=session.engine,
            targets=drawn.targets,
        )
        if self.update_norm is not None:
            self.numbers["update_norm"] = self.update_norm.end()
        session.advance(drawn)
        scalars, self.numbers = {"loss": loss, **self.numbers}, {}
        known = {
            "step": session.progress.step,
            "lr": lr,
            "tokens": session.progress.tokens,
            "real_tokens": session.progress.real_tokens,
            "data_seconds": drawn.waited,
        }
        return Pending(scalars, known, drawn.batches, session.progress.draws, began)

    def before_update(self, loss: Tensor) -> bool:
        """Clip; and where bad batches are to be skipped, wait for the numbers that decide it."""
        run, model = self.run, self.session.model
        if run.clip:
            norm = nn.utils.clip_grad_norm_(model.parameters(), run.clip)
            self.numbers["grad_norm"] = whole(norm)
        elif (run.log_norms and not run.plan.per_layer_update) or run.on_nan == "skip":
            self.numbers["grad_norm"] = whole(gradient_norm(model.parameters()))
        if run.on_nan != "skip":
            return True
        return bool(torch.isfinite(loss) & torch.isfinite(self.numbers["grad_norm"]))

    def settle(self, pending: Pending | None, *, validating: bool = False) -> None:
        """Look at an update's numbers, which the device has by now; then write its row."""
        if pending is None:
            return
        row, verdict = self.ledger.read(pending)
        if verdict == "nan" and not self.accept(pending, row["loss"]):
            return
        if verdict != "nan" and self.run.on_nan == "skip":
            self.tries = 0
        result = self.validate(EVAL_BATCHES) if validating else None
        if result is not None:
            row["validation_loss"], row["validation_tokens"] = result.loss, result.tokens
            part = "" if result.whole else f" over {result.tokens:,} tokens of the split"
            self.live.note(f"step {row['step']}: validation loss {result.loss:.4f}{part}")
        self.ledger.write(row)

    def settle_all(self, *, validating: bool = False) -> None:
        """Look at the last update's numbers now."""
        pending, self.pending = self.pending, None
        self.settle(pending, validating=validating)

    def accept(self, pending: Pending, loss: float) -> bool:
        """Whether to go on from an update whose loss is no number. Raises where it is to stop."""
        session, step = self.session, pending.known["step"]
        self.tries += 1
        if self.tries > _TRIES[self.run.on_nan]:
            raise self.diverged(f"The loss is {loss} at step {step}.")
        if self.run.on_nan == "skip":
            return True  # its update was left out
        self.saver.wait()
        session.world.barrier()
        found = checkpoint.newest(self.run.out, say_damaged)
        assert found is not None, "one is written before the first update"
        dropped = [*session.progress.dropped, pending.draw]
        session.restore(*found)
        if session.world.writes:
            checkpoint.set_aside(self.run.out, session.progress.step)
        session.progress.dropped = dropped
        self.pending, self.saved_at = None, session.progress.step
        self.ledger.log.cut(session.progress.step)
        self.live.note(f"Back at step {self.saved_at}, without that batch.")
        return False

    def between(self) -> None:
        """Validate and save where it is time to."""
        run, progress = self.run, self.session.progress
        self.saver.check()
        if run.eval_every and progress.step % run.eval_every == 0 and progress.step < run.steps:
            self.settle_all(validating=True)
            if run.keep.best and self.session.improved():
                self.save()
        if run.save_every and progress.step % run.save_every == 0:
            self.save()

    def validate(self, limit: int) -> Validation | None:
        """Over ``limit`` micro-batches, or with 0 all of the split (of a stream EVAL_BATCHES); None
        where the run is to stop first.
        """
        session, stop, whole = self.session, self.stop, 0
        if isinstance(session.validation, StreamBatches):
            total = limit or EVAL_BATCHES
            drawn = session.validation.evaluation(total)
        else:
            whole = -(-len(session.validation) // session.plan.micro_batch)
            total = min(limit or whole, whole)
            drawn = session.validation.evaluation(total, session.device)
        until_signal = itertools.takewhile(lambda batch: not stop.wanted(), drawn)
        watched = self.live.watch("validating", until_signal, total)
        try:
            result = evaluate(session.model, watched, session.plan, session.engine, whole)
        except EffprofError:
            if not stop.wanted():
                raise
            return None
        if stop.wanted():
            return None
        session.validated(result.loss)
        return result

    def save(self) -> Path:
        """Begin to write a checkpoint of the run as it is, if there is none of it."""
        session = self.session
        self.settle_all()
        step = session.progress.step
        path = checkpoint.place(self.run.out, step)
        if self.saved_at == step:
            return path
        if not session.finite():
            raise self.diverged(f"A weight is no longer finite at step {step}.")
        if session.world.writes or session.plan.parallel == "fsdp":
            self.saver.save(session.model, session.optimizer, session.state())
        self.saved_at = step
        self.tries = 0
        return path

    def diverged(self, message: str) -> EffprofError:
        """The error of a run that has no numbers any more, and what is left of it on the disk."""
        with contextlib.suppress(EffprofError):  # a write that failed: its checkpoint is not there
            self.saver.wait()
        self.session.world.barrier()
        last = checkpoint.last_step(self.run.out)
        known = last is not None
        kept = f"the checkpoint of step {last} is kept" if known else "there is no checkpoint yet"
        return EffprofError(message, f"Use a smaller --lr, --clip 1 or --dtype fp32; {kept}.")

    def close(self) -> None:
        self.session.close()
        self.saver.close()
        self.ledger.close()
