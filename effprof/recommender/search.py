"""Every plan of a space with its memory and time: arrays, over what ``instants`` counts once."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
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
from effprof.plan import Plan, from_dict
from effprof.recommender import lines
from effprof.recommender.curves import Curve, curve
from effprof.recommender.instants import Held, Numbers, held, passage, regular
from effprof.recommender.lines import Kept
from effprof.recommender.space import SHORT, Candidate, Space
from effprof.step import Step, work_out

Rows = npt.NDArray[np.int64]
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
    candidate: Rows
    form: Rows
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


class Search:
    """The plans of a space for a card: arrays of (candidate, form, bytes, seconds per position) as
    they are found.
    """

    def __init__(self, space: Space, card: Gpu) -> None:
        self.space, self.card = space, card
        self.allocators, self.batches = space.allocators(), space.batches()
        self.candidates: list[Candidate] = []
        self.rows: list[tuple[npt.NDArray[Any], ...]] = []
        self.forms: dict[Form, int] = {}
        self.layers: dict[Any, int] = {}  # a number of each kind of decoder layer
        self._kinds: dict[Any, Rows] = {}
        self._variants: dict[Any, Plan | None] = {}
        self._curves: dict[Any, Curve] = {}

    def found(
        self, candidates: Sequence[Candidate], told: Told = lambda done, total: None
    ) -> Found:
        """Every plan of these candidates, and of those before. ``told`` has how many are done, of
        all. Raises UsageError where no plan is left.
        """
        before, total = len(self.candidates), len(candidates)
        for _, own in itertools.groupby(candidates, key=lambda one: one.line):
            told(len(self.candidates) - before, total)
            line = list(own)
            self._add(len(self.candidates), line)
            self.candidates += line
        told(total, total)
        if not self.rows:
            raise UsageError("No plan takes these flags.", "Leave some of them out.")
        index, form, sizes, seconds = map(np.concatenate, zip(*self.rows, strict=True))
        forms, gpus = list(self.forms), self.space.gpus
        batch = np.array([one.micro_batch * one.grad_accum * gpus for one in forms])
        known = [np.nan if one.perplexity is None else one.perplexity for one in self.candidates]
        return Found(
            self.space,
            list(self.candidates),
            forms,
            index,
            form,
            sizes,
            seconds,
            np.array(known, np.float64)[index],
            batch[form] == self.space.global_batch,
        )

    def _add(self, first: int, line: Sequence[Candidate]) -> None:
        """Every form of candidates that differ in rank alone; ``first`` is the first's number."""
        candidate, space = line[0], self.space
        plan, numbers = candidate.plan, np.arange(first, first + len(line))
        layers = self.layers.setdefault(_fingerprint(candidate.step), len(self.layers))
        rates = None if unknown(self.card, plan) else rates_of(self.card, plan)
        own = self._kept(line, rates) if regular(plan) else None
        for way in itertools.product(space.open("checkpointing"), space.open("loss")):
            variant = self._variant(layers, candidate, *way)
            for accumulates, batches in self._batches(plan) if variant else ():
                assert variant is not None
                if own is None:
                    self._replay(numbers, variant, batches)
                    continue
                copies = _gradients(plan, accumulates=accumulates)
                fresh = not (copies or plan.per_layer_update)
                curve = self._curve(layers, variant, rates, fresh=fresh)
                places = [curve.places[size] for size, _ in batches]
                sizes = _together(curve, own, copies)[..., places]
                took = self._update_seconds(line, curve.seconds[:, places], batches, own)
                self._append(numbers, variant, batches, sizes, took if rates else took * np.nan)

    def _kept(self, line: Sequence[Candidate], rates: Rates | None) -> Kept:
        """What each candidate of a line holds: of a long one three are counted, if they are
        alike.
        """

        def found(some: Sequence[Candidate]) -> list[Held]:
            return [held(_alone(one.step), self.card, rates, self.allocators) for one in some]

        if len(line) > SHORT:
            nodes = [line[0], line[len(line) // 2], line[-1]]
            counted = found(nodes)
            if lines.alike(counted):
                ranks = [[one.plan.rank or 0 for one in some] for some in (nodes, line)]
                return lines.kept(counted, lines.weights(*ranks))
        counted = found(line)
        return lines.together([lines.kept([one], np.ones((1, 1))) for one in counted])

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

    def _curve(self, layers: Any, variant: Plan, rates: Rates | None, *, fresh: bool) -> Curve:
        """Passages at the smallest and the largest micro-batch, the others between them."""
        key = (layers, variant.checkpointing, variant.loss, fresh)
        if key not in self._curves:
            sizes = [size for size, times in self.batches if times == 1 or not fresh]
            ends = [
                passage(work_out(variant.with_batch(size, 1)), self.card, fresh=fresh)
                for size in dict.fromkeys((sizes[0], sizes[-1]))
            ]
            self._curves[key] = curve(ends[0], ends[-1], sizes, rates, self.allocators)
        return self._curves[key]

    def _update_seconds(
        self,
        line: Sequence[Candidate],
        passing: Numbers,
        batches: list[tuple[int, int]],
        own: Kept,
    ) -> Numbers:
        """Seconds of an update over its positions, by candidate × batch; positions are those of all
        GPUs, and what these say to one another is included.
        """
        micro, often = np.array(batches).T
        total: Numbers = passing.sum(0) * often + own.seconds[:, None]
        if self.space.gpus > 1 and own.seconds.any():
            for row, (one, update) in enumerate(zip(line, own.seconds.tolist(), strict=True)):
                for at, (forward, backward) in enumerate((passing * often).T.tolist()):
                    batch = one.plan.with_batch(*batches[at])
                    phases = {"forward": forward, "backward": backward, "update": update}
                    step = dataclasses.replace(one.step, plan=batch)
                    total[row, at] += traffic(step, self.card, phases | {"refresh": 0.0}).exposed
        total /= micro * often * self.space.gpus * line[0].plan.seq_len
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

    def _replay(self, numbers: Rows, plan: Plan, batches: list[tuple[int, int]]) -> None:
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
        self._append(numbers, plan, batches, sizes[None], seconds[None])

    def _append(
        self,
        numbers: Rows,
        plan: Plan,
        batches: list[tuple[int, int]],
        sizes: Numbers,
        seconds: Numbers,
    ) -> None:
        key = (plan.checkpointing, plan.loss, *batches)
        if key not in self._kinds:
            self._kinds[key] = np.array(
                [
                    self.forms.setdefault(
                        Form(plan.checkpointing, plan.loss, *batch, allocator), len(self.forms)
                    )
                    for allocator in self.allocators
                    for batch in batches
                ]
            )
        forms = self._kinds[key]
        took = np.broadcast_to(seconds[:, None], sizes.shape).ravel()
        index = np.repeat(numbers, len(forms))
        self.rows.append((index, np.tile(forms, len(numbers)), sizes.ravel(), took))


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


def _together(curve: Curve, own: Kept, copies: int) -> Numbers:
    """Peaks of an update in bytes, by candidate × allocator × batch, whose micro-steps find so many
    copies of the gradients.
    """
    gradients, transient = own.gradients[..., None], own.transient[..., None]
    if own.in_backward:
        alive = np.maximum(curve.peak, transient)
        for name, size in own.in_backward.items():
            alive = np.maximum(alive, curve.completed[name] + size[..., None])
    else:
        alive = np.maximum(curve.peak + copies * gradients, gradients + transient)
    total: Numbers = own.resident[..., None] + alive
    return total


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
