"""What is alive at each instant of a step, without replaying all of it: three decoder layers stand
for any number of them, and an update is counted apart from a micro-step's passage.

The tape is the estimator's own, of the plan's Step with fewer layers: the middle layer's instants
repeat at a constant distance. Plans that differ in their update half alone share their passages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from effprof.allocator import MIN_BLOCK, MIN_LARGE, ROUND_LARGE, SMALL_SIZE, Settings
from effprof.estimator.autograd import Graph
from effprof.estimator.memory import no_collector
from effprof.estimator.operations import CHUNK
from effprof.estimator.time import Rates, seconds
from effprof.estimator.updates import Run
from effprof.estimator.work import Work, add_kernel, multiply, rewrite, streams_through
from effprof.gpus import Gpu
from effprof.kernels import EMBEDDING_SCRATCH
from effprof.plan import Plan
from effprof.step import Step, layer_of
from effprof.tape import Tape

Sizes = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Blocks = Callable[[Sizes], Sizes]
LAYERS = 3  # the first, one that stands for all between, the last
SCRATCH = "scratch"
_STEADY = 1  # the number of an update in which every state is there and nothing periodic happens


@dataclass(frozen=True, slots=True)
class Passage:
    """One micro-step at one batch: what each event allocates (> 0) or frees, in bytes, and which of
    the three layers it lies in, forwards and backwards (0 to 5).

    ``completed`` are the instants at which a parameter's gradient is complete, layers taken
    together: where ``--per-layer-update`` updates it. Left out is what comes and goes at one
    instant and is no line over batches: chunks of the loss, whose first is in ``chunk``, and the
    embedding's scratch. ``instants`` has where they would be.

    An event that allocates stands for so many ``kernels``, and for so many that stream what it
    allocates; ``products`` are those forwards and backwards.
    """

    step: Step
    changes: Sizes
    sections: Sizes
    completed: dict[str, list[int]]
    instants: dict[str, int]
    chunk: Sizes
    kernels: Sizes
    streamed: Sizes
    forward: Flags
    products: tuple[Work, Work]


@dataclass(frozen=True, slots=True)
class Held:
    """What a plan holds between micro-steps (weights, buffers, workspaces, states) by allocator,
    and what an update takes above it by allocator × event: at the end, or ``in_backward`` by
    parameter. ``seconds`` are the update's, periodic work in the mean (0 without rates).
    """

    resident: Sizes
    gradients: Sizes
    transient: Sizes
    in_backward: dict[str, Sizes]
    seconds: float


def regular(plan: Plan) -> bool:
    """Whether each micro-step is like the others, which blocks that take turns are not."""
    hooks = ("active", "differentiated", "before_step", "turns")
    return not any(hasattr(half, hook) for half, _ in plan.recipe.hooked() for hook in hooks)


def passage(step: Step, card: Gpu, *, fresh: bool) -> Passage:
    """A steady micro-step; unless ``fresh`` its gradients go where others are, or are updated and
    freed, as soon as they are complete.
    """
    with no_collector():
        run = _small(step, card, LAYERS)
        tape = run.graph.tape
        done: list[tuple[int, str]] = []
        if not fresh:
            run.place_gradients()
        start = len(tape.events)
        run.graph.on_gradient = lambda leaf: done.append((len(tape.events), _any_layer(leaf.label)))
        run.micro_steps.run("steady")
        run.graph.close()
    turn = _turn(tape) - start
    parts = [_part(tape.labels[storage]) for storage, _ in tape.events[start:]]
    sections = _sections(tape, start, turn, min(LAYERS, step.architecture.layers))
    changes = np.array([change for _, change in tape.events[start:]], np.int64)
    kept = np.array([not part for part in parts])
    chunks = np.array([part == CHUNK for part in parts])
    before = np.cumsum(kept) - kept  # how many that stay stand before each
    completed: dict[str, list[int]] = {}
    for event, name in done:  # the gradient itself has been freed where it was added to another
        completed.setdefault(name, []).append(int(before[max(event - start - 2, 0)]))
    return Passage(
        step,
        changes[kept],
        sections[kept],
        completed,
        {part: int(before[parts.index(part)]) for part in (CHUNK, SCRATCH) if part in parts},
        _first(changes[chunks]),
        *_kernels(step, tape, start, sections, kept),
        _products(step, card),
    )


def _kernels(
    step: Step, tape: Tape, start: int, sections: Sizes, kept: Flags
) -> tuple[Sizes, Sizes, Flags]:
    """Of each event that stays: how many kernels it stands for, what it streams per byte it
    allocates (0 or as often), whether it lies in the forward.
    """
    extra = max(step.architecture.layers - LAYERS, 0)
    events = tape.events[start:]
    made = np.array([size > 0 for _, size in events])
    streams = np.array([size > 0 and streams_through(tape, storage) for storage, size in events])
    times = 1 + extra * np.isin(sections, (1, 4))
    forward = np.arange(len(events)) < _turn(tape) - start
    return (times * made)[kept], (times * streams)[kept], forward[kept]


def _products(step: Step, card: Gpu) -> tuple[Work, Work]:
    """The matrix products forwards and backwards."""
    found = {"forward": Work(), "backward": Work()}
    multiply(step, card, found)
    return found["forward"], found["backward"]


def held(step: Step, card: Gpu, rates: Rates | None, allocators: Sequence[str]) -> Held:
    """What stays between micro-steps and what an update takes, at any batch."""
    with no_collector():
        run = _small(step, card, 1)
        events = run.graph.tape.events
        weights = len(events)
        run.place_states()
        first = len(events)
        run.place_gradients()
        last = len(events)
        spans = _updates(run)
        run.graph.close()
    changes = np.array([abs(change) for _, change in events], np.int64)
    times, signs = _times(run, step.architecture.layers), _signs(run)
    sizes = np.array([blocks(step.plan, one)(changes) * times for one in allocators])
    # Where tensors are sharded each process holds the states of those it owns.
    owned = step.resident()["optimizer"] if step.plan.parallel == "fsdp" else None
    live: dict[str, list[Sizes]] = {"": [sizes[:, :1] * 0]}
    for name, start, end in spans:
        alive = np.cumsum(sizes[:, start:end] * signs[start:end], axis=1)
        live.setdefault(name, []).append(alive)
    above = {name: np.concatenate(parts, axis=1) for name, parts in live.items()}
    return Held(
        sizes[:, :weights].sum(1) + (owned or sizes[:, weights:first].sum(1)),
        sizes[:, first:last].sum(1),
        above.pop(""),
        above,
        0.0 if rates is None else _update_seconds(step, rates, run, last),
    )


def blocks(plan: Plan, allocator: str) -> Blocks:
    """The blocks that serve requests: a fresh segment's rest of up to 1 MiB stays with it."""
    expandable = Settings.of(allocator).expandable

    def found(sizes: Sizes) -> Sizes:
        if plan.device == "cpu":
            return sizes
        rounded = np.maximum(-(-sizes // MIN_BLOCK) * MIN_BLOCK, MIN_BLOCK)
        whole = -(-rounded // ROUND_LARGE) * ROUND_LARGE
        fitted = (rounded >= MIN_LARGE) & (whole - rounded <= SMALL_SIZE) & (not expandable)
        return np.where(fitted, whole, rounded)

    return found


def _small(step: Step, card: Gpu, layers: int) -> Run:
    """The step's model with fewer layers, on an empty tape."""
    shape = step.architecture
    fewer = dataclasses.replace(shape, layers=min(layers, shape.layers))
    graph = Graph(Tape(), on_cpu=step.plan.device == "cpu")
    run = Run(graph, dataclasses.replace(step, architecture=fewer), card)
    run.number = _STEADY
    return run


def _any_layer(name: str) -> str:
    return name.replace(f".layers.{layer_of(name)}.", ".layers.*.")


def _part(label: str) -> str:
    """Of what an event is a part that comes and goes at one instant; empty for the others."""
    if label.startswith(CHUNK):
        return CHUNK
    return SCRATCH if label.rpartition(" ")[2] in EMBEDDING_SCRATCH else ""


def _first(changes: Sizes) -> Sizes:
    """The changes up to where nothing of theirs is alive."""
    ends = np.flatnonzero(np.cumsum(changes) == 0)
    return changes[: ends[0] + 1] if len(ends) else changes


def _sections(tape: Tape, start: int, turn: int, layers: int) -> Sizes:
    """Of each event the layer it lies in: 0, 1, 2 forwards, 3, 4, 5 backwards."""
    found, section, labels = [], 0, tape.labels
    for number, (storage, change) in enumerate(tape.events[start:]):
        if change > 0 and ".layers." in labels[storage]:
            layer = layer_of(labels[storage])
            section = max(section, layer if number < turn else 2 * layers - 1 - layer)
        found.append(section)
    return np.array(found, np.int64)


def _turn(tape: Tape) -> int:
    """The event with which the last backward begins."""
    return next(at for at, _, phase in reversed(tape.marks) if phase == "backward")


def _updates(run: Run) -> list[tuple[str, int, int]]:
    """The events (first, last) of each update the plan has; in backward, of each parameter."""
    events, spans = run.graph.tape.events, []
    kinds = sorted(run.plan.updates, key=lambda one: one[1] != _STEADY)  # the steady one first
    for kind, run.number in kinds:
        first = len(events)
        run.apply(kind)
        spans.append(("", first, len(events)))
        if not run.plan.per_layer_update:
            continue
        run.place_gradients()
        for cell in run.optimizer.cells:
            first = len(events)
            *_, leaf = cell.leaves  # the last to be complete
            run.optimizer.update_in_backward(leaf, run.number)
            spans.append((_any_layer(leaf.label), first, len(events)))
    return spans


def _times(run: Run, layers: int) -> Sizes:
    """How many layers each event of a model of one stands for: what is held by all of them at once
    counts for all.
    """
    tape, plan = run.graph.tape, run.plan
    at_once = {"weights", "buffers", "optimizer", "gradients"}
    foreach = plan.optimizer_impl == "foreach" and not plan.per_layer_update
    cells = run.optimizer.cells if foreach else []
    hosted = {f"optimizer.{one.name}" for one in cells if one.trained.hosted}
    of_all = [
        ".layers." in label and (role in at_once or label.rpartition(".")[0] in hosted)
        for label, role in zip(tape.labels, tape.roles, strict=True)
    ]
    return np.where(of_all, layers, 1)[[storage for storage, _ in tape.events]]


def _signs(run: Run) -> Sizes:
    """1 where an event allocates, -1 where it frees, 0 for gradients: those freed meanwhile do not
    count.
    """
    counts = np.array([role != "gradients" for role in run.graph.roles])
    events = np.array(run.graph.tape.events, np.int64)
    found: Sizes = np.sign(events[:, 1]) * counts[events[:, 0]]
    return found


def _update_seconds(step: Step, rates: Rates, run: Run, start: int) -> float:
    """The update's own kernels, those of the one layer as often as there are layers."""
    found = {"update": Work(), "refresh": Work()}
    tape, layers = run.graph.tape, step.architecture.layers
    end = next((at for at, kind, _ in tape.marks if at > start and kind != "steady"), None)
    for storage, size in tape.events[start:end]:
        if size > 0 and tape.roles[storage] != "gradients":
            times = layers if ".layers." in tape.labels[storage] else 1
            add_kernel(found["update"], tape, storage, size, times)
    rewrite(step, found)
    on_cpu = step.plan.device == "cpu"
    return sum(seconds(one, rates, on_cpu=on_cpu) for one in found.values())
