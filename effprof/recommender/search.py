"""Every plan of a space with its memory and time: arrays, over what ``instants`` counts once."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from effprof.errors import UsageError
from effprof.estimator.flops import flops
from effprof.estimator.memory import memory
from effprof.estimator.network import traffic
from effprof.estimator.time import Rates, rates_of, time, unknown
from effprof.gpus import Gpu
from effprof.kernels import UNSORTED_INDICES
from effprof.plan import Plan, from_dict
from effprof.recommender.instants import Held, Passage, held, passage, regular
from effprof.recommender.space import Candidate, Space
from effprof.step import Step, work_out

Numbers = npt.NDArray[np.float64]
Told = Callable[[int, int], None]


@dataclass(frozen=True)
class Form:
    """How activations are kept, on which batch, by which allocator."""

    checkpointing: str
    loss: str
    micro_batch: int
    grad_accum: int
    allocator: str


@dataclass(frozen=True)
class Found:
    """One row per plan. ``memory`` is peak_allocated in bytes, ``seconds`` of an update over the
    positions of all GPUs (NaN where the time is not known), ``own_batch`` whether an update has the
    rows asked for.
    """

    space: Space
    candidates: Sequence[Candidate]
    forms: Sequence[Form]
    candidate: npt.NDArray[np.int64]
    form: npt.NDArray[np.int64]
    memory: Numbers
    seconds: Numbers
    perplexity: Numbers
    own_batch: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.memory)

    def plan(self, row: int) -> Plan:
        """The plan of a row, checked as any other."""
        candidate, form = self.candidates[self.candidate[row]], self.forms[self.form[row]]
        settings = {**self.space.values.get("settings", {}), **candidate.given.get("settings", {})}
        return from_dict(
            {
                **self.space.values,
                **candidate.given,
                **vars(form),
                "settings": settings,
                "global_batch": None,
            }
        )


def search(
    space: Space,
    candidates: Sequence[Candidate],
    card: Gpu,
    told: Told = lambda done, total: None,
) -> Found:
    """Evaluate every plan of the space. ``told`` has how many candidates are done, of all.

    Raises UsageError where no plan is left.
    """
    run = _Search(space, card)
    for done, candidate in enumerate(candidates):
        told(done, len(candidates))
        run.add(done, candidate)
    told(len(candidates), len(candidates))
    if not run.rows:
        raise UsageError("No plan takes these flags.", "Leave some of them out.")
    index, form, sizes, seconds = (np.concatenate(column) for column in zip(*run.rows, strict=True))
    forms = list(run.forms)
    batch = np.array([one.micro_batch * one.grad_accum * space.gpus for one in forms])
    known = [np.nan if one.perplexity is None else one.perplexity for one in candidates]
    return Found(
        space,
        candidates,
        forms,
        index,
        form,
        sizes,
        seconds,
        np.array(known, np.float64)[index],
        batch[form] == space.global_batch,
    )


@dataclass(frozen=True)
class _Curve:
    """A way of passing at any micro-batch: bytes by allocator × batch, seconds forwards and
    backwards × batch.
    """

    peak: Numbers
    completed: Mapping[str, Numbers]
    seconds: Numbers


class _Search:
    """Rows as they are found: arrays of (candidate, form, bytes, seconds per position)."""

    def __init__(self, space: Space, card: Gpu) -> None:
        self.space, self.card = space, card
        self.allocators, self.batches = space.allocators(), space.batches()
        self.places = {size: at for at, (size, _) in enumerate(self.batches)}
        self.rows: list[tuple[Numbers, ...]] = []
        self.forms: dict[Form, int] = {}
        self._variants: dict[Any, Plan | None] = {}
        self._curves: dict[Any, _Curve] = {}

    def add(self, number: int, candidate: Candidate) -> None:
        """Every form of one candidate."""
        plan, space = candidate.plan, self.space
        quick, layers = regular(plan), _fingerprint(candidate.step)
        rates = None if unknown(self.card, plan) else rates_of(self.card, plan)
        kept = held(_alone(candidate.step), self.card, rates, self.allocators) if quick else None
        for way in itertools.product(space.open("checkpointing"), space.open("loss")):
            variant = self._variant(layers, candidate, *way)
            for accumulates, batches in self._batches(plan) if variant else ():
                assert variant is not None
                if kept is None:
                    self._replay(number, variant, batches)
                    continue
                kinds = _gradients(plan, accumulates=accumulates)
                fresh = not (kinds or plan.per_layer_update)
                curve = self._curve(layers, variant, rates, fresh=fresh)
                places = [self.places[size] for size, _ in batches]
                sizes = _together(curve, kept, kinds)[:, places]
                took = self._update_seconds(candidate.step, curve.seconds[:, places], batches, kept)
                self._append(number, variant, batches, sizes, took if rates else took * np.nan)

    def _variant(
        self, layers: Any, candidate: Candidate, checkpointing: str, loss: str
    ) -> Plan | None:
        """The candidate's plan with activations kept in that way; None where it cannot."""
        key = (layers, checkpointing, loss)
        if key not in self._variants:
            values = {**candidate.plan.as_dict(), "checkpointing": checkpointing, "loss": loss}
            if regular(candidate.plan):  # a passage is the same wherever its gradients go
                values["per_layer_update"] = None
            try:
                variant = from_dict(values)
                alone = regular(variant) and variant.parallel == "ddp"
                self._variants[key] = variant.alone() if alone else variant
            except UsageError:
                self._variants[key] = None
        return self._variants[key]

    def _curve(self, layers: Any, variant: Plan, rates: Rates | None, *, fresh: bool) -> _Curve:
        """Passages at some micro-batches, the others between them. Between two samples a tape has
        the same events, whose sizes are linear in the batch.
        """
        key = (layers, variant.checkpointing, variant.loss, fresh)
        if key in self._curves:
            return self._curves[key]
        sizes = [size for size, _ in self.batches]
        parts: list[tuple[Numbers, Mapping[str, Numbers], Numbers]] = []
        for run in [sizes[-1:]] if fresh else _runs(variant, sizes):
            first, last = (self._passage(variant, run[at], rates, fresh) for at in (0, -1))
            for size in run:
                share = (size - run[0]) / (run[-1] - run[0] or 1)
                parts.append(_between(first, last, share))
        peaks, completed, sides = zip(*parts, strict=True)
        columns = len(sizes) - len(parts)
        self._curves[key] = _Curve(
            _columns(peaks, columns),
            {name: _columns([one[name] for one in completed], columns) for name in completed[0]},
            _columns([self._seconds(one) for one in sides], columns),
        )
        return self._curves[key]

    def _passage(self, variant: Plan, size: int, rates: Rates | None, fresh: bool) -> Passage:
        step = work_out(variant.with_batch(size, 1))
        return passage(step, self.card, rates, self.allocators, fresh=fresh)

    def _seconds(self, sides: Numbers) -> Numbers:
        """Of the device's and the host's, forwards and backwards: a CPU is both."""
        if not len(sides):
            return np.zeros(2)
        pairs = sides.reshape(2, 2)
        found: Numbers = pairs.sum(1) if self.space.on_cpu else pairs.max(1)
        return found

    def _update_seconds(
        self, step: Step, passing: Numbers, batches: list[tuple[int, int]], kept: Held
    ) -> Numbers:
        """Seconds of an update over its positions, those of all GPUs; what GPUs say to one another
        included.
        """
        micro, often = np.array(batches).T
        total: Numbers = passing.sum(0) * often + kept.seconds
        if step.plan.gpus > 1 and kept.seconds:
            for at, (forward, backward) in enumerate((passing * often).T.tolist()):
                batch = step.plan.with_batch(*batches[at])
                phases = {"forward": forward, "backward": backward, "update": kept.seconds}
                own = dataclasses.replace(step, plan=batch)
                total[at] += traffic(own, self.card, phases | {"refresh": 0.0}).exposed
        total /= micro * often * self.space.gpus * step.plan.seq_len
        return total

    def _batches(self, plan: Plan) -> list[tuple[bool, list[tuple[int, int]]]]:
        """Whether they accumulate, and those micro-batches with their accumulation. An update in
        backward does not accumulate: it has fewer rows, where that is left open.
        """
        found = self.batches
        whole = [(size, times) for size, times in found if times == 1]
        rest = [(size, times) for size, times in found if times > 1]
        if plan.per_layer_update:
            whole = [(size, 1) for size, _ in found] if self.space.batch_is_open else whole
            rest = []
        return [(adds, one) for adds, one in ((True, rest), (False, whole)) if one]

    def _replay(self, number: int, plan: Plan, batches: list[tuple[int, int]]) -> None:
        """Plans whose micro-steps differ are estimated whole."""
        sizes, seconds = np.zeros((len(self.allocators), len(batches))), np.zeros(len(batches))
        for at, (micro_batch, grad_accum) in enumerate(batches):
            for row, allocator in enumerate(self.allocators):
                values = {**plan.as_dict(), "allocator": allocator, "micro_batch": micro_batch}
                values |= {"grad_accum": grad_accum, "global_batch": None}
                step = work_out(from_dict(values))
                found = memory(step, self.card)
                took = time(step, found.tape, self.card, flops(step))
                sizes[row, at] = found.peak.size
                seconds[at] = np.nan if took is None else took.update / took.positions
        self._append(number, plan, batches, sizes, seconds)

    def _append(
        self,
        number: int,
        plan: Plan,
        batches: list[tuple[int, int]],
        sizes: Numbers,
        seconds: Numbers,
    ) -> None:
        for allocator, own in zip(self.allocators, sizes, strict=True):
            forms = [
                self.forms.setdefault(
                    Form(plan.checkpointing, plan.loss, *batch, allocator), len(self.forms)
                )
                for batch in batches
            ]
            self.rows.append((np.full(len(forms), number), np.array(forms), own, seconds))


def _gradients(plan: Plan, *, accumulates: bool) -> int:
    """How many copies of all gradients a micro-step finds: DDP's buckets are there throughout, and
    what is not yet to be reduced accumulates beside them.
    """
    if plan.per_layer_update:
        return 0
    zeros = plan.zero_grad == "zero"
    if plan.parallel == "ddp":
        return 2 if accumulates and not zeros else 1
    return int(accumulates or zeros)


def _together(curve: _Curve, kept: Held, copies: int) -> Numbers:
    """Peaks of an update in bytes, by allocator × batch, whose micro-steps find so many copies of
    the gradients.
    """
    gradients, transient = (np.array(one)[:, None] for one in (kept.gradients, kept.transient))
    if kept.in_backward:
        alive = np.maximum(curve.peak, transient)
        for name, size in kept.in_backward.items():
            alive = np.maximum(alive, curve.completed[name] + np.array(size)[:, None])
    else:
        alive = np.maximum(curve.peak + copies * gradients, gradients + transient)
    total: Numbers = np.array(kept.resident)[:, None] + alive
    return total


def _columns(rows: Sequence[Numbers], missing: int) -> Numbers:
    """One column per micro-batch; those before the first that is there are not asked for."""
    found: Numbers = np.stack(rows, axis=-1)
    return np.concatenate((np.zeros((*found.shape[:-1], missing)), found), axis=-1)


def _between(
    first: Passage, last: Passage, share: float
) -> tuple[Numbers, Mapping[str, Numbers], Numbers]:
    """Peaks by allocator, all and by completed parameter, and seconds at a batch between two, whose
    tapes have the same events with sizes linear in the batch.
    """
    alive = first.alive + share * (last.alive - first.alive)
    completed = {name: alive[:, events].max(1) for name, events in first.completed.items()}
    sides = np.array(first.seconds) * (1 - share) + np.array(last.seconds) * share
    return alive.max(1), completed, sides


def _runs(plan: Plan, sizes: Sequence[int]) -> list[list[int]]:
    """Micro-batches among which nothing but sizes changes: embedding's backward has other buffers
    from some positions on, and no more distinct tokens than the vocabulary; the loss has as many
    chunks.
    """

    def regime(size: int) -> tuple[Any, ...]:
        positions = size * plan.seq_len
        chunks = positions / plan.with_batch(size, 1).loss_rows if plan.loss == "chunked" else 0
        return (positions <= UNSORTED_INDICES, positions <= plan.architecture.vocab, chunks)

    return [list(run) for _, run in itertools.groupby(sizes, regime)]


_PASSED = ("forward", "backward", "backward_input", "backward_weights")


def _alone(step: Step) -> Step:
    """What one of DDP's processes computes is what a GPU alone does."""
    return work_out(step.plan.alone()) if step.plan.parallel == "ddp" else step


def _fingerprint(step: Step) -> tuple[Any, ...]:
    """What a passage depends on: the layers."""
    plan = step.plan
    layers = tuple(
        (
            unit.matrix,
            unit.tensors,
            unit.saved,
            tuple((name, unit.transient.get(name)) for name in _PASSED),
            unit.layer_half,
        )
        for unit in (*step.before, *step.layer, *step.after)
    )
    return (layers, plan.parallel, None if regular(plan) else str(plan.as_dict()))
