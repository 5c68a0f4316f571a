"""Tapes traced under fake tensors: every storage an operation makes, and when it goes.

The CPU build of torch runs the step's real Python; only the numbers are missing. Rules stand in
for what fake kernels do not show, and for what CUDA kernels do otherwise.
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from effprof.tape import Tape

Rule = Callable[["FakeRecorder", Any, Sequence[Any], Mapping[str, Any]], Any]
Beside = Callable[[Sequence[Any], Any], Sequence[tuple[int, str]]]
_POINTWISE = torch.Tag.pointwise
_OUTSIDE = {"forward": "loss", "update": "optimizer"}  # what runs in no module
HOST = "host"  # the role of what a GPU run keeps in the CPU's memory


class FakeRecorder(FakeTensorMode):  # type: ignore[no-untyped-call]
    """A fake-tensor mode that writes a tape. ``rules`` replace operations by their overload;
    ``beside`` says what pointwise operations hold for a moment, by their arguments and result.

    A storage counts from the operation that returns it to its last reference. ``label`` of an
    event is the module that ran and the operation; in backward the module whose forward made the
    node that runs.
    """

    def __init__(self, rules: Mapping[Any, Rule], beside: Beside | None = None) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.tape = Tape()
        self.rules = rules
        self.beside = beside
        self.questions: dict[str, int] = {}
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._beside: dict[int, list[int]] = {}
        self._depth = 0
        self._makes: dict[Any, bool] = {}
        self._path: list[str] = []
        self._nodes: list[int] = []
        self._node_paths: list[str] = []
        self._phase = ("build", "build")
        self._first = 0
        self._recomputed: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._depth:  # a decomposition inside an operation: a kernel does it in one
            return super().__torch_dispatch__(func, types, args, kwargs)
        self._depth = 1
        rule = self.rules.get(func)
        begun = len(self.tape.roles)
        try:
            if rule is None:
                out = super().__torch_dispatch__(func, types, args, kwargs)
            else:
                out = rule(self, func, args, kwargs or {})
        finally:
            self._depth = 0
        makes = self._makes.get(func)
        if makes is None:
            makes = self._makes[func] = any(one.alias_info is None for one in func._schema.returns)
        if makes:
            self.note(out, func)
        if self.beside is not None and _POINTWISE in func.tags:
            self.scratch(self.beside(args, out))
        if self._phase[1] == "backward":
            self._watch_recomputation(begun)
        return out

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """An operation as fake tensors do it: what rules call."""
        return super().__torch_dispatch__(func, (), tuple(args), dict(kwargs))

    @property
    def in_forward(self) -> bool:
        return self._phase[1] == "forward"

    @property
    def in_backward(self) -> bool:
        return self._phase[1] == "backward"

    def note(self, out: Any, func: Any) -> None:
        """Record the storages of a result that are new."""
        if isinstance(out, Tensor):
            storage = out.untyped_storage()
            key = storage._cdata
            if key not in self._alive:
                self._alive[key] = self._add(storage, key, func)
        elif isinstance(out, (tuple, list)):
            for one in out:
                self.note(one, func)

    def _add(self, storage: Any, key: int, func: Any) -> tuple[weakref.ref[Any], int]:
        index = self._new(func._schema.name.rpartition("::")[2])
        if storage.nbytes():
            self.tape.events.append((index, storage.nbytes()))
        return self._followed(storage, key, index)

    def _followed(self, storage: Any, key: int, index: int) -> tuple[weakref.ref[Any], int]:
        """A storage whose end is written on the tape."""
        size = storage.nbytes()
        alive, beside, events = self._alive, self._beside, self.tape.events

        def gone(_: Any) -> None:
            del alive[key]
            if size:
                events.append((index, -size))
            for other in beside.pop(index, ()):
                events.append((other, -_size(events, other)))

        return weakref.ref(storage, gone), index

    def _new(self, operation: str, role: str = "workspace") -> int:
        index = len(self.tape.roles)
        self.tape.roles.append(role)
        self.tape.labels.append(f"{self._module()}.{operation}".lstrip("."))
        return index

    def _module(self) -> str:
        """The module that runs, or whose forward made the autograd node that runs."""
        if self._phase[1] != "backward" or torch.is_grad_enabled():
            return self._path[-1] if self._path else _OUTSIDE.get(self._phase[1], "")
        node = torch._C._current_autograd_node()
        if node is None or not self._nodes:
            return "backward"
        place = bisect.bisect_right(self._nodes, node._sequence_nr()) - 1
        return f"{self._node_paths[max(place, 0)] or 'loss'} backward"

    def scratch(self, sizes: Sequence[tuple[int, str]]) -> None:
        """Bytes that a kernel holds beside its results, freed when it returns."""
        made = [(self.keep(size, label), size) for size, label in sizes if size]
        self.tape.events += [(index, -size) for index, size in made]

    def keep(self, size: int, label: str, role: str = "workspace") -> int:
        """Bytes that stay: a library's workspace."""
        index = self._new(label, role)
        self.tape.events.append((index, size))
        return index

    def keep_beside(self, tensor: Tensor, size: int, label: str) -> None:
        """Bytes that live as long as a tensor's storage."""
        _, owner = self._alive[tensor.untyped_storage()._cdata]
        self._beside.setdefault(owner, []).append(self.keep(size, label, "activations"))

    def index_of(self, tensor: Tensor) -> int | None:
        """The place on the tape of a tensor's storage."""
        found = self._alive.get(tensor.untyped_storage()._cdata)
        return None if found is None else found[1]

    def alive_since(self, first: int) -> set[int]:
        """Storages from the given one on that are alive."""
        return {index for _, index in self._alive.values() if index >= first}

    def twin(self, make: Callable[[], Tensor], index: int) -> Tensor:
        """A tensor whose storage is already on the tape."""
        self._depth += 1
        try:
            made = make()
        finally:
            self._depth -= 1
        storage = made.untyped_storage()
        self._alive[storage._cdata] = self._followed(storage, storage._cdata, index)
        return made

    def ask(self, question: str) -> None:
        """Note that a value was asked for which a fake tensor does not have."""
        self.questions[question] = self.questions.get(question, 0) + 1

    def mark(self, update: str, phase: str) -> None:
        """From here on events belong to this phase of this kind of update."""
        if self._phase[1] == "forward" and phase != "forward":
            self._assign_activations(range(self._first, len(self.tape.roles)))
        if phase == "forward":
            self._first = len(self.tape.roles)
        self._phase = (update, phase)
        self.tape.mark(update, phase)

    def inner(self, phase: str) -> None:
        """A part of an update begins, or (empty) ends; backward stays backward."""
        if self._phase[1] != "backward":
            self.tape.mark(self._phase[0], phase or self._phase[1])

    def _watch_recomputation(self, begun: int) -> None:
        """What a checkpoint runs again in backward and leaves alive is an activation."""
        if torch.is_grad_enabled():
            self._recomputed += range(begun, len(self.tape.roles))
        elif self._recomputed:
            self._assign_activations(self._recomputed)
            self._recomputed = []

    def _assign_activations(self, indices: Sequence[int]) -> None:
        wanted, roles = set(indices), self.tape.roles
        for _, index in self._alive.values():
            if index in wanted and roles[index] == "workspace":
                roles[index] = "activations"

    def role(self, tensor: Tensor) -> str:
        """The role that a tensor's storage has so far."""
        index = self.index_of(tensor)
        return "" if index is None else self.tape.roles[index]

    def assign(self, tensor: Tensor, role: str) -> None:
        """Give a tensor's storage a role."""
        index = self.index_of(tensor)
        if index is not None:
            self.tape.roles[index] = role

    def name(self, named: Mapping[str, Tensor], role: str) -> None:
        """Give the storages of these tensors their role and label."""
        for label, tensor in named.items():
            found = self._alive.get(tensor.untyped_storage()._cdata)
            if found is not None:
                self.tape.roles[found[1]] = role
                self.tape.labels[found[1]] = label

    def follow(self, model: nn.Module) -> None:
        """Label what happens with the module it happens in."""
        for path, module in model.named_modules():
            if path:
                module.register_forward_pre_hook(self._entering(path))
                module.register_forward_hook(self._leaving, always_call=True)

    def _entering(self, path: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self._path.append(path)
            self._from_here(path)

        return enter

    def _leaving(self, *_: Any) -> None:
        if self._path:
            self._path.pop()
        self._from_here(self._path[-1] if self._path else "")

    def _from_here(self, path: str) -> None:
        """Autograd nodes made from now on belong to this module."""
        self._nodes.append(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
        self._node_paths.append(path)

    def finished(self) -> Tape:
        """The tape up to now, without what a GPU run keeps on the host."""
        tape = Tape(list(self.tape.events), self.tape.roles, self.tape.labels, self.tape.marks)
        host = {index for index, role in enumerate(tape.roles) if role == HOST}
        if not host:
            return tape
        kept: list[tuple[int, int]] = []
        marks: list[tuple[int, str, str]] = []
        place = 0
        starts = [start for start, _, _ in tape.marks]
        for number, event in enumerate(tape.events):
            while place < len(starts) and starts[place] <= number:
                marks.append((len(kept), *tape.marks[place][1:]))
                place += 1
            if event[0] not in host:
                kept.append(event)
        marks += [(len(kept), update, phase) for _, update, phase in tape.marks[place:]]
        roles = ["workspace" if role == HOST else role for role in tape.roles]
        return Tape(kept, roles, tape.labels, marks)


def _size(events: Sequence[tuple[int, int]], index: int) -> int:
    """The bytes a storage was allocated with, looked for from the end."""
    return next(size for one, size in reversed(events) if one == index and size > 0)
