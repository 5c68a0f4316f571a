"""The bytes alive at each instant of a step, without replaying all of it: three decoder layers
stand for any number of them, and an update is counted apart from a micro-step's passage.

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
from effprof.estimator.time import Rates, seconds, sides
from effprof.estimator.updates import Run
from effprof.estimator.work import Work, add_kernel, multiply, rewrite
from effprof.gpus import Gpu
from effprof.plan import Plan
from effprof.step import Step, layer_of
from effprof.tape import Tape

Sizes = npt.NDArray[np.int64]
LAYERS = 3  # the first, one that stands for all between, the last
_STEADY = 1  # the number of an update in which every state is there and nothing periodic happens


@dataclass(frozen=True, slots=True)
class Passage:
    """One micro-step: the bytes alive at each instant above what is held before it, by allocator.

    ``completed`` are the instants at which a parameter's gradient is complete, layers taken
    together: where ``--per-layer-update`` updates it. ``seconds`` are the device's and the host's,
    forwards and backwards: four numbers, none without rates.
    """

    alive: Sizes
    completed: dict[str, list[int]]
    seconds: list[float]


@dataclass(frozen=True, slots=True)
class Held:
    """What a plan holds between micro-steps (weights, buffers, workspaces, states) under each
    allocator, and what an update takes above it: at the end, or ``in_backward`` by parameter.
    ``seconds`` are the update's, periodic work in the mean (0 without rates).
    """

    resident: list[int]
    gradients: list[int]
    transient: list[int]
    in_backward: dict[str, list[int]]
    seconds: float


def regular(plan: Plan) -> bool:
    """Whether each micro-step is like the others, which blocks that take turns are not."""
    hooks = ("active", "differentiated", "before_step", "turns")
    return not any(hasattr(half, hook) for half, _ in plan.recipe.hooked() for hook in hooks)


def passage(
    step: Step, card: Gpu, rates: Rates | None, allocators: Sequence[str], *, fresh: bool
) -> Passage:
    """A steady micro-step; unless ``fresh`` its gradients go where others are, or are updated and
    freed, as soon as they are complete.
    """
    plan = step.plan
    with no_collector():
        run = _small(step, card, LAYERS)
        tape = run.graph.tape
        done: list[tuple[int, str]] = []
        if not fresh:
            run.place_gradients()
        start = len(tape.events)
        run.graph.on_gradient = lambda leaf: done.append((len(tape.events), _any_layer(leaf.label)))
        run.micro_step("steady")
        run.graph.close()
    sections = _sections(tape, start, min(LAYERS, step.architecture.layers))
    changes = np.array([change for _, change in tape.events[start:]], np.int64)
    extra = max(step.architecture.layers - LAYERS, 0)
    alive = [_alive(changes, sections, extra, blocks(plan, one)) for one in allocators]
    completed: dict[str, list[int]] = {}
    for event, name in done:  # the gradient itself has been freed where it was added to another
        completed.setdefault(name, []).append(max(event - start - 2, 0))
    times = 1 + extra * np.isin(sections, (1, 4))
    took = [] if rates is None else _passage_seconds(step, card, rates, tape, start, times)
    return Passage(np.stack(alive), completed, took)


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
    resident, gradients, transient = [], [], []
    in_backward: dict[str, list[int]] = {}
    for number, allocator in enumerate(allocators):
        sizes = _sizes(run, step.architecture.layers, blocks(step.plan, allocator))
        # Where tensors are sharded each process holds the states of those it owns.
        owned = step.resident()["optimizer"] if step.plan.parallel == "fsdp" else None
        resident.append(sum(sizes[:weights]) + (owned or sum(sizes[weights:first])))
        gradients.append(sum(sizes[first:last]))
        transient.append(0)
        for name, start, end in spans:
            most = in_backward.setdefault(name, [0] * len(allocators)) if name else transient
            most[number] = max(most[number], _highest(run, sizes, start, end))
    took = 0.0 if rates is None else _update_seconds(step, rates, run, last)
    return Held(resident, gradients, transient, in_backward, took)


def blocks(plan: Plan, allocator: str) -> Callable[[Sizes], Sizes]:
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


def _sections(tape: Tape, start: int, layers: int) -> Sizes:
    """Of each event the layer it lies in: 0, 1, 2 forwards, 3, 4, 5 backwards."""
    turn = _turn(tape)
    found, section, labels = [], 0, tape.labels
    for number, (storage, change) in enumerate(tape.events[start:], start):
        if change > 0 and ".layers." in labels[storage]:
            layer = layer_of(labels[storage])
            section = max(section, layer if number < turn else 2 * layers - 1 - layer)
        found.append(section)
    return np.array(found, np.int64)


def _turn(tape: Tape) -> int:
    """The event with which the last backward begins."""
    return next(at for at, _, phase in reversed(tape.marks) if phase == "backward")


def _alive(changes: Sizes, sections: Sizes, extra: int, block: Callable[[Sizes], Sizes]) -> Sizes:
    """Bytes alive after each event, were there ``extra`` more layers like the middle one: the
    most of its repetitions.
    """
    live = np.cumsum(np.sign(changes) * block(np.abs(changes)))
    if not extra:
        return live
    before = np.concatenate(([0], live))
    entries = before[np.searchsorted(sections, np.arange(2 * LAYERS))]
    deepest, back = extra * (entries[2] - entries[1]), extra * (entries[5] - entries[4])
    first, last = max(0, deepest), deepest + max(0, back)
    shifts = np.array([0, first, deepest, deepest, last, deepest + back])
    shifted: Sizes = live + shifts[sections]
    return shifted


def _passage_seconds(
    step: Step, card: Gpu, rates: Rates, tape: Tape, start: int, times: Sizes
) -> list[float]:
    """The kernels of one micro-step, each as many times as it is run."""
    found = {"forward": Work(), "backward": Work()}
    turn, often = _turn(tape) - start, times.tolist()
    for number, (storage, size) in enumerate(tape.events[start:]):
        if size > 0:
            phase = "forward" if number < turn else "backward"
            add_kernel(found[phase], tape, storage, size, often[number])
    multiply(step, card, found)
    on_cpu = step.plan.device == "cpu"
    return [side for one in found.values() for side in sides(one, rates, on_cpu=on_cpu)]


def _updates(run: Run) -> list[tuple[str, int, int]]:
    """The events (first, last) of each update the plan has; in backward, of each parameter."""
    events, spans = run.graph.tape.events, []
    kinds = sorted(run.plan.updates, key=lambda one: one[1] != _STEADY)  # the steady one first
    for kind, run.number in kinds:
        first = len(events)
        run.apply(kind)
        spans.append(("", first, len(events)))
        for cell in run.cells if run.plan.per_layer_update else ():
            run.place_gradients()
            first = len(events)
            *_, leaf = cell.leaves  # the last to be complete
            run.update_in_backward(leaf)
            spans.append((_any_layer(leaf.label), first, len(events)))
    return spans


def _sizes(run: Run, layers: int, block: Callable[[Sizes], Sizes]) -> list[int]:
    """The bytes of each event of a model of one layer; what is held by all layers at once counts
    for all of them.
    """
    tape, plan = run.graph.tape, run.plan
    at_once = {"weights", "buffers", "optimizer", "gradients"}
    foreach = plan.optimizer_impl == "foreach" and not plan.per_layer_update
    hosted = {f"optimizer.{one.name}" for one in run.cells if one.trained.hosted and foreach}
    times = [
        layers
        if ".layers." in tape.labels[storage]
        and (tape.roles[storage] in at_once or tape.labels[storage].rpartition(".")[0] in hosted)
        else 1
        for storage, _ in tape.events
    ]
    changes = np.array([abs(change) for _, change in tape.events], np.int64)
    sizes: list[int] = (block(changes) * np.array(times)).tolist()
    return sizes


def _highest(run: Run, sizes: list[int], first: int, last: int) -> int:
    """The most alive above what was there before; gradients freed meanwhile do not count."""
    live = most = 0
    for number in range(first, last):
        storage, change = run.graph.tape.events[number]
        if run.graph.roles[storage] != "gradients":
            live += sizes[number] if change > 0 else -sizes[number]
            most = max(most, live)
    return most


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
