"""A way of passing at any micro-batch: between two passages every size is a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from effprof.estimator.operations import CHUNK
from effprof.estimator.time import Rates, seconds
from effprof.estimator.work import MAPPED, Work
from effprof.kernels import embedding_backward
from effprof.plan import Plan
from effprof.recommender.instants import LAYERS, SCRATCH, Blocks, Numbers, Passage, Sizes, blocks

_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Curve:
    """``peak`` has the most bytes alive by allocator × batch, ``completed`` those when a
    parameter's gradient is complete, ``seconds`` are forwards and backwards × batch. ``places`` is
    each micro-batch's column.
    """

    places: Mapping[int, int]
    peak: Sizes
    completed: Mapping[str, Sizes]
    seconds: Numbers


def curve(
    first: Passage,
    last: Passage,
    sizes: Sequence[int],
    rates: Rates | None,
    allocators: Sequence[str],
) -> Curve:
    """The passages of micro-batches of so many rows, from those of the smallest and the largest."""
    batches = [last.step.plan.with_batch(size, 1) for size in sizes]
    shares = _shares(first, last, [plan.positions for plan in batches], "positions")
    rows = _shares(first, last, [plan.loss_rows for plan in batches], "loss_rows")
    changes = _between(first.changes, last.changes, shares)
    chunks = _between(first.chunk, last.chunk, rows)
    scratch = [_scratch(plan) if SCRATCH in last.instants else _NONE for plan in batches]
    peaks = []
    completed: dict[str, list[Sizes]] = {name: [] for name in last.completed}
    for name in allocators:
        block = blocks(last.step.plan, name)
        alive = _alive(last, changes, block)
        aside = {
            CHUNK: np.cumsum(np.sign(chunks) * block(np.abs(chunks)), axis=1),
            SCRATCH: np.array([[block(one).sum()] for one in scratch]),
        }
        most = [alive[:, at - 1] + aside[part].max(1) for part, at in last.instants.items()]
        peaks.append(np.max([alive.max(1), *most], axis=0))
        for parameter, events in last.completed.items():
            completed[parameter].append(alive[:, events].max(1))
    took = np.zeros((2, len(sizes)))
    if rates is not None:
        works = _works(first, last, shares, batches, changes, chunks, scratch)
        on_cpu = last.step.plan.device == "cpu"
        took = np.array([[seconds(one, rates, on_cpu=on_cpu) for one in side] for side in works])
    places = {size: at for at, size in enumerate(sizes)}
    return Curve(places, np.stack(peaks), {k: np.stack(v) for k, v in completed.items()}, took)


def _shares(first: Passage, last: Passage, values: Sequence[int], name: str) -> Numbers:
    """How far each value lies on the way from the first passage's to the last's."""
    ends = [getattr(one.step.plan, name) for one in (first, last)]
    found: Numbers = (np.array(values) - ends[0]) / ((ends[1] - ends[0]) or 1)
    return found


def _between(first: Sizes, last: Sizes, shares: Numbers) -> Sizes:
    """Sizes by batch × event."""
    found: Sizes = np.rint(first + shares[:, None] * (last - first)).astype(np.int64)
    return found


def _scratch(plan: Plan) -> Sizes:
    shape = plan.architecture
    held = embedding_backward(plan.positions, shape.vocab, shape.hidden)
    return np.array([size for size, _ in held], np.int64)


def _alive(passage: Passage, changes: Sizes, block: Blocks) -> Sizes:
    """Bytes alive by batch × event, of all layers: where there are more than three, the most of the
    middle one's repetitions.
    """
    live = np.cumsum(np.sign(changes) * block(np.abs(changes)), axis=1)
    extra = max(passage.step.architecture.layers - LAYERS, 0)
    if not extra:
        return live
    before = np.concatenate((np.zeros_like(live[:, :1]), live), axis=1)
    entries = before[:, np.searchsorted(passage.sections, np.arange(2 * LAYERS))].T
    deepest, back = extra * (entries[2] - entries[1]), extra * (entries[5] - entries[4])
    forward = [deepest * 0, np.maximum(deepest, 0), deepest]
    backward = [deepest, deepest + np.maximum(back, 0), deepest + back]
    found: Sizes = live + np.stack([*forward, *backward], axis=1)[:, passage.sections]
    return found


def _works(
    first: Passage,
    last: Passage,
    shares: Numbers,
    batches: Sequence[Plan],
    changes: Sizes,
    chunks: Sizes,
    scratch: Sequence[Sizes],
) -> tuple[list[Work], list[Work]]:
    """The kernels forwards and backwards at each batch."""
    found: tuple[list[Work], list[Work]] = [], []
    for number, (side, phase) in enumerate(zip(found, (last.forward, ~last.forward), strict=True)):
        kernels = float(last.kernels[phase].sum())
        streamed = changes[:, phase] * last.streamed[phase]
        mapped = (streamed * (changes[:, phase] >= MAPPED)).sum(1)
        for at, share in enumerate(shares.tolist()):
            one = _work_between(first.products[number], last.products[number], share)
            one.kernels += kernels
            one.stream(float(streamed[at].sum() - mapped[at]), mapped=False)
            one.stream(float(mapped[at]), mapped=True)
            side.append(one)
    for at, plan in enumerate(batches):
        _add(found[0][at], chunks[at], plan.positions / plan.loss_rows)
        _add(found[1][at], scratch[at], 1)
    return found


def _work_between(first: Work, last: Work, share: float) -> Work:
    """Products whose FLOPs and bytes are lines over batches."""

    def at(one: float, other: float) -> float:
        return one + share * (other - one)

    pairs = zip(first.products, last.products, strict=True)
    return Work(
        [(at(one[0], other[0]), at(one[1], other[1])) for one, other in pairs],
        attention=at(first.attention, last.attention),
        traffic=at(first.traffic, last.traffic),
    )


def _add(one: Work, changes: Sizes, times: float) -> None:
    """What comes and goes at one instant, so many times."""
    for size in changes[changes > 0].tolist():
        one.kernels += times
        one.stream(times * size, mapped=size >= MAPPED)
