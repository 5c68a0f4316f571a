"""Training in full: the loop, its metrics, its checkpoints, and what it leaves behind."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from effprof.errors import DoesNotFitError, EffprofError
from effprof.estimator.estimate import Estimate, estimate
from effprof.files import write_folder, write_whole
from effprof.measure.device import DeviceMeter, meter
from effprof.report.live import LiveLine
from effprof.trainer import checkpoint, metrics, schedule
from effprof.trainer.build import build, resolve_device
from effprof.trainer.corpus import FileCorpus, corpus
from effprof.trainer.data import Batches, Rows, StreamBatches, rows
from effprof.trainer.evaluate import Validation, evaluate
from effprof.trainer.export import export, has_dense_form
from effprof.trainer.optimizer import MethodOptimizer
from effprof.trainer.run import Run, open_folder
from effprof.trainer.step import training_step
from effprof.trainer.tokenizer import tokenizer

KEEP_CHECKPOINTS = 2
EVAL_BATCHES = 64  # of the validation split during a run; the last evaluation takes all of it
_SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``exit_code`` 0, or 130 / 143 after a signal, with a checkpoint written."""

    exit_code: int
    summary: dict[str, Any]


class Interrupt:
    """Remembers SIGINT, SIGTERM and SIGUSR1 until the step is finished."""

    def __init__(self) -> None:
        self.code = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.code = _SIGNALS[signal.Signals(number)]
        self.__exit__()  # a second signal does what it always did


def train(run: Run, *, resume: bool = False, force: bool = False) -> Outcome:
    """Train a run to its end or to a signal.

    Raises EffprofError; nothing already written is lost.
    """
    device = resolve_device(run.plan.device, run.plan.allocator)
    found = open_folder(run, resume=resume)
    expected = estimate(run.plan)
    machine = meter(device)
    if expected.total > machine.total() and not force:
        raise DoesNotFitError(
            f"The estimate is {expected.total:,} bytes, the device has {machine.total():,}.",
            "Use a smaller --micro-batch or --checkpointing full, or --force to try anyway.",
        )
    _check_disk(run, expected, force=force)
    with Interrupt() as interrupt:
        session = Session(run, device, expected, machine)
        if found:
            session.restore(*found)
        return session.go(interrupt)


def _check_disk(run: Run, expected: Estimate, *, force: bool) -> None:
    """Room for the checkpoints a run keeps, one being written, and the exported model."""
    held = expected.step.resident()
    checkpoint_bytes = held["weights"] + held["optimizer"] + held["buffers"]
    needed = (KEEP_CHECKPOINTS + 1) * checkpoint_bytes + expected.step.architecture.parameters * 4
    existing = next(path for path in (run.out, *run.out.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed and not force:
        raise EffprofError(
            f"The run needs up to {needed:,} bytes in {str(existing)!r}, {free:,} are free.",
            "Free some space, give another --out, or --force to try anyway.",
        )


class Session:
    """One process's part of a run."""

    def __init__(
        self, run: Run, device: torch.device, expected: Estimate, machine: DeviceMeter
    ) -> None:
        self.run, self.plan, self.device = run, run.plan, device
        self.expected, self.machine = expected, machine
        texts = corpus(run.data)
        self.fingerprint = texts.fingerprint()
        kept = run.out / "tokenizer"  # ids mean what they meant, whatever becomes of the data
        self.tokenizer = tokenizer(
            texts, self.plan.architecture.vocab, str(kept) if kept.is_dir() else run.tokenizer
        )
        self.batches: Batches | StreamBatches
        self.validation: Rows | StreamBatches
        if isinstance(texts, FileCorpus):
            train_rows = rows(texts, self.tokenizer, self.plan, "train")
            self.batches = Batches(train_rows, self.plan, run.seed, device)
            self.validation = rows(texts, self.tokenizer, self.plan, "validation")
        else:
            self.batches = StreamBatches(texts, self.tokenizer, self.plan, "train", device)
            self.validation = StreamBatches(texts, self.tokenizer, self.plan, "validation", device)
        run.write()  # nothing is written for data that cannot be trained on
        if not kept.is_dir():
            write_folder(kept, self.tokenizer.save_pretrained)
        machine.begin()
        self.model: nn.Module
        self.optimizer: MethodOptimizer
        self.model, self.optimizer = build(self.plan, str(device), lr=run.lr, seed=run.seed)
        self.optimizer.clock.total_updates = run.steps
        self.step, self.tokens, self.real_tokens = 0, 0, 0
        self.saved_at: int | None = None
        self.resumed_at: int | None = None

    def restore(self, path: Path, state: dict[str, Any]) -> None:
        """Go on from a checkpoint: weights, optimizer, random state, place in the data.

        Later metrics are cut.
        """
        if state["corpus"] != self.fingerprint:
            raise EffprofError(
                f"The data of {str(self.run.out)!r} has changed since step {state['step']}.",
                "Put the old files back, or start again with another --out.",
            )
        checkpoint.restore(path, state, self.model, self.optimizer)
        self.batches.load_state_dict(state["data"])
        self.step, self.tokens, self.real_tokens = (
            state["step"],
            state["tokens"],
            state["real_tokens"],
        )
        self.saved_at = self.resumed_at = self.step

    def go(self, interrupt: Interrupt) -> Outcome:
        """Update until the run's last step or a signal, then evaluate, save and export."""
        run, start = self.run, time.monotonic()
        metrics_path = run.out / "metrics.jsonl"
        metrics.cut(metrics_path, self.step)
        with (
            metrics.Log(metrics_path) as log,
            LiveLine(run.steps, self.step, self.expected.total) as live,
        ):
            if self.resumed_at is not None:
                live.note(f"Resumed at step {self.resumed_at}.")
            while self.step < run.steps and not interrupt.code:
                row = self._update()
                if run.eval_every and self.step % run.eval_every == 0 and self.step < run.steps:
                    result = self._validate(EVAL_BATCHES, interrupt, live)
                    if result:
                        row |= {"validation_loss": result.loss}
                        live.note(f"step {self.step}: validation loss {result.loss:.4f}")
                log.append(row)
                live.show(row)
                if run.save_every and self.step % run.save_every == 0:
                    self._save()
            path = self._save()
            if not interrupt.code:
                live.note("Validating and writing the model …")
            result = None if interrupt.code else self._validate(None, interrupt, live)
            if interrupt.code:
                live.note(
                    f"Interrupted at step {self.step}; checkpoint {path}. "
                    f"Go on with the same command and --out {run.out} --resume."
                )
                return Outcome(interrupt.code, self._summary(None, time.monotonic() - start))
        summary = self._summary(result, time.monotonic() - start)
        if has_dense_form(self.model):
            export(self.model, self.tokenizer, self.plan, run.out / "model")
        write_whole(run.out / "summary.json", json.dumps(summary, indent=1) + "\n")
        return Outcome(0, summary)

    def _update(self) -> dict[str, Any]:
        """One optimizer update on the next micro-batches, and its metrics."""
        began = time.perf_counter()
        lr = self.run.lr * schedule.factor(
            self.run.schedule, self.step, self.run.warmup, self.run.steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        lr *= self.optimizer.lr_factor()
        batches = [self.batches.next() for _ in range(self.plan.grad_accum)]
        loss = float(
            training_step(self.model, self.optimizer, batches, self.plan, clip=self.run.clip)
        )
        if not math.isfinite(loss):
            raise self._diverged(f"The loss is {loss} at step {self.step + 1}.")
        seconds = time.perf_counter() - began
        positions = self.plan.global_batch * self.plan.seq_len
        self.step += 1
        self.tokens += positions
        self.real_tokens += sum(batch.real_tokens for batch in batches)
        now, peak = self.machine.now(), self.machine.peak()
        return {
            "step": self.step,
            "loss": loss,
            "lr": lr,
            "tokens": self.tokens,
            "real_tokens": self.real_tokens,
            "tokens_per_second": positions / seconds,
            "seconds": seconds,
            "memory": now,
            "memory_peak": peak,
            "mfu": self.machine.mfu(self.expected.flops.dense_equivalent / seconds),
        }

    def _diverged(self, message: str) -> EffprofError:
        kept = (
            f"the checkpoint of step {self.saved_at} is kept"
            if self.saved_at
            else "there is no checkpoint yet"
        )
        return EffprofError(message, f"Use a smaller --lr, --clip 1 or --dtype fp32; {kept}.")

    def _validate(
        self, limit: int | None, interrupt: Interrupt, live: LiveLine
    ) -> Validation | None:
        """Over ``limit`` micro-batches or all of the split; None where a signal cut it short."""
        if isinstance(self.validation, StreamBatches):
            total = limit or EVAL_BATCHES
            drawn = self.validation.evaluation(total)
        else:
            whole = -(-len(self.validation) // self.plan.micro_batch)
            total = min(limit or whole, whole)
            drawn = self.validation.evaluation(limit, self.device)
        until_signal = itertools.takewhile(lambda batch: not interrupt.code, drawn)
        try:
            result = evaluate(self.model, live.watch("validating", until_signal, total), self.plan)
        except EffprofError:
            if not interrupt.code:
                raise
        return None if interrupt.code else result

    def _save(self) -> Path:
        path = self.run.out / f"{checkpoint.PREFIX}{self.step:08d}"
        if self.saved_at == self.step:
            return path
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise self._diverged(f"A weight is no longer finite at step {self.step}.")
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "real_tokens": self.real_tokens,
            "data": self.batches.state_dict(),
            "corpus": self.fingerprint,
            "run": self.run.identity(),
        }
        path = checkpoint.save(self.run.out, self.model, self.optimizer, state, KEEP_CHECKPOINTS)
        self.saved_at = self.step
        return path

    def _summary(self, result: Validation | None, seconds: float) -> dict[str, Any]:
        return {
            "schema": "effprof.train/1",
            "out": str(self.run.out),
            "plan": self.plan.as_dict(),
            "train": self.run.table(),
            "steps": self.step,
            "tokens": self.tokens,
            "real_tokens": self.real_tokens,
            "seconds": seconds,
            "resumed_at": self.resumed_at,
            "memory": {
                "estimated": self.expected.total,
                "measured_peak": self.machine.peak(),
                "meter": self.machine.name,
            },
            "validation": None
            if result is None
            else {
                "loss": result.loss,
                "perplexity": result.perplexity,
                "lineage_loss": result.lineage_loss,
                "tokens": result.tokens,
            },
        }
