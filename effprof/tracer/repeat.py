"""Micro-steps that were traced before: their events again, without running them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effprof.plan import Plan
from effprof.tracer.recorder import FakeRecorder
from effprof.trainer.batch import Batch
from effprof.trainer.layer import MethodLinear
from effprof.trainer.step import micro_step


@dataclass(frozen=True, slots=True)
class _Like:
    """How a tensor lies in its storage."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Like:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def made(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)


@dataclass(frozen=True, slots=True)
class _Recording:
    """Events (start, turn to backward, end), storages (first, last), what outlived it: gradients
    by their place and the loss, each with its storage.
    """

    events: tuple[int, int, int]
    storages: tuple[int, int]
    gradients: dict[str, tuple[_Like, int]]
    loss: tuple[_Like, int]


class MicroSteps:
    """Runs a micro-step, or repeats one: the same program runs as long as the same tensors need a
    gradient and have one already.
    """

    def __init__(self, recorder: FakeRecorder, model: nn.Module, plan: Plan) -> None:
        self.recorder = recorder
        self.parameters = dict(model.named_parameters())
        self.layers = {
            path: module
            for path, module in model.named_modules()
            if isinstance(module, MethodLinear)
        }
        self.repeats = not plan.per_layer_update  # whose first update also makes states
        self.seen: dict[tuple[object, ...], _Recording] = {}

    def __call__(
        self,
        model: nn.Module,
        batch: Batch,
        plan: Plan,
        share: float,
        on_phase: Callable[[str], None],
    ) -> Tensor:
        before = self.gradients()
        needed = tuple(name for name, one in self.parameters.items() if one.requires_grad)
        key = (needed, tuple(before), share)
        if key in self.seen:
            return self._repeat(self.seen[key], on_phase)
        tape = self.recorder.tape
        start, first, turn = len(tape.events), len(tape.roles), 0

        def noting(phase: str) -> None:
            nonlocal turn
            turn = len(tape.events)
            on_phase(phase)

        loss = micro_step(model, batch, plan, share, noting)
        found = {name: (one, self.recorder.index_of(one)) for name, one in self.gradients().items()}
        made = {n: (one, at) for n, (one, at) in found.items() if at is not None and at >= first}
        at = self.recorder.index_of(loss)
        assert at is not None
        whole = all(index >= first for index, _ in tape.events[start:])
        left = {at, *(index for _, index in made.values())}
        if self.repeats and whole and self.recorder.alive_since(first) == left:
            span = (start, turn, len(tape.events))
            gradients = {name: (_Like.of(one), index) for name, (one, index) in made.items()}
            storages = (first, len(tape.roles))
            self.seen[key] = _Recording(span, storages, gradients, (_Like.of(loss), at))
        return loss

    def _repeat(self, recording: _Recording, on_phase: Callable[[str], None]) -> Tensor:
        tape, recorder = self.recorder.tape, self.recorder
        (start, turn, end), (first, last) = recording.events, recording.storages
        offset = len(tape.roles) - first
        on_phase("forward")
        tape.events += [(index + offset, size) for index, size in tape.events[start:turn]]
        on_phase("backward")
        tape.events += [(index + offset, size) for index, size in tape.events[turn:end]]
        tape.roles += tape.roles[first:last]
        tape.labels += tape.labels[first:last]
        for name, (like, index) in recording.gradients.items():
            self._set(name, recorder.twin(like.made, index + offset))
        like, index = recording.loss
        return recorder.twin(like.made, index + offset)

    def gradients(self) -> dict[str, Tensor]:
        """Every gradient there is, by its tensor's name."""
        found = {n: one.grad for n, one in self.parameters.items() if one.grad is not None}
        for path, layer in self.layers.items():
            found |= {f"{path}.{name}": one for name, one in layer.gradients.items()}
        return found

    def _set(self, name: str, gradient: Tensor) -> None:
        parameter = self.parameters[name]
        if parameter.is_floating_point():
            parameter.grad = gradient
        else:
            path, _, own = name.rpartition(".")
            self.layers[path].gradients[own] = gradient
