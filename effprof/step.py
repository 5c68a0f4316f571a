"""Step: the plan worked out. Every tensor that training it keeps, and where each comes from."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from effprof import registry
from effprof.model import Architecture, Matrix
from effprof.plan import Plan
from effprof.registry import ITEMSIZE, Saved, Tensor, UpdateHalf


@dataclass(frozen=True, slots=True)
class Trained:
    """One trainable tensor with what the optimizer keeps for it.

    ``matrix`` has this tensor's own shape. ``covered`` says whether the plan's update half takes
    it; the rest is AdamW.
    """

    tensor: Tensor
    matrix: Matrix
    covered: bool
    hosted: bool
    state: tuple[Tensor, ...]
    transient: Mapping[str, tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Unit:
    """One parameter of the architecture, in the form the method gives it.

    ``targeted`` is whether a method's halves take it; ``layer_half`` whether the method replaced
    its linear layer.
    """

    matrix: Matrix
    targeted: bool
    layer_half: bool
    tensors: tuple[Tensor, ...]
    saved: Saved
    transient: Mapping[str, tuple[Tensor, ...]]
    trained: tuple[Trained, ...]


@dataclass(frozen=True)
class Step:
    """Every unit of one decoder layer (all layers are alike), and of what stands before and
    after them.
    """

    plan: Plan
    architecture: Architecture
    layer: tuple[Unit, ...]
    before: tuple[Unit, ...]
    after: tuple[Unit, ...]

    def units(self) -> Iterator[tuple[Unit, int]]:
        """Each distinct unit with how many times it occurs."""
        for unit in (*self.before, *self.after):
            yield unit, 1
        for unit in self.layer:
            yield unit, self.architecture.layers

    @functools.cached_property
    def placed(self) -> tuple[tuple[str, Unit], ...]:
        """Every unit with its own name, in the order of the model's parameters."""
        layers = [
            (unit.matrix.name.replace("layers.0.", f"layers.{index}."), unit)
            for index in range(self.architecture.layers)
            for unit in self.layer
        ]
        ends = [[(unit.matrix.name, unit) for unit in part] for part in (self.before, self.after)]
        return (*ends[0], *layers, *ends[1])

    def count(self, *, trainable: bool = False, targeted: bool = False) -> int:
        """Parameters held; only trainable ones, or only those of targeted matrices, where asked."""
        return sum(
            times * tensor.numel
            for unit, times in self.units()
            if unit.targeted or not targeted
            for tensor in unit.tensors
            if tensor.role == "weights" and (tensor.trainable or not trainable)
        )

    def resident(self) -> dict[str, int]:
        """Requested bytes held between updates, by role."""
        sizes = dict.fromkeys(("weights", "gradients", "optimizer", "buffers"), 0)
        for unit, times in self.units():
            for tensor in unit.tensors:
                sizes[tensor.role] += times * self.nbytes(tensor)
            for trained in unit.trained:
                sizes["optimizer"] += times * sum(map(self.nbytes, trained.state))
                if self.plan.zero_grad == "zero":
                    sizes["gradients"] += times * self.nbytes(trained.tensor)
        sizes["buffers"] += sum(map(self.nbytes, model_buffers(self.plan)))
        return sizes

    def itemsize(self, dtype: str) -> int:
        """Bytes per number of a dtype name, the plan's own names resolved."""
        if dtype == "upcast":
            return 0 if self.plan.weight_dtype == "fp32" else ITEMSIZE["fp32"]
        return ITEMSIZE[self.dtype(dtype)]

    def dtype(self, name: str) -> str:
        """``weight``, ``compute`` and ``state`` as the plan has them; other names as they are."""
        plan = self.plan
        if name == "state":
            return plan.weight_dtype if plan.state_dtype == "same" else plan.state_dtype
        return {"weight": plan.weight_dtype, "compute": plan.compute_dtype}.get(name, name)

    def nbytes(self, tensor: Tensor) -> int:
        return tensor.numel * self.itemsize(tensor.dtype)


def work_out(plan: Plan) -> Step:
    """The step of a plan. Raises UsageError where a method cannot take one of the matrices."""
    shape = plan.architecture
    layer = [_linear(plan, matrix) for matrix in shape.layer_matrices()]
    layer += [
        _plain(plan, Matrix(name, length, 1, kind, 0, flat=True))
        for name, length, kind in shape.layer_vectors()
    ]
    norm = Matrix("model.norm.weight", shape.hidden, 1, "norm", flat=True)
    after = [_plain(plan, norm)]
    if shape.head:
        after.append(_plain(plan, shape.head))
    return Step(plan, shape, tuple(layer), (_plain(plan, shape.embedding),), tuple(after))


def model_buffers(plan: Plan) -> tuple[Tensor, ...]:
    """Buffers of the model itself: inv_freq and its untouched original; gemma's embedding scale."""
    half = plan.architecture.head_dim // 2
    rotary = [
        Tensor(name, (half,), "fp32", "buffers") for name in ("inv_freq", "original_inv_freq")
    ]
    scale = [Tensor("embed_scale", (), "weight", "buffers")] if plan.architecture.gemma else []
    return (*rotary, *scale)


def _linear(plan: Plan, matrix: Matrix) -> Unit:
    """A linear layer: the method's form if it is targeted, the dense matrix else."""
    if matrix.block not in plan.targets:
        return _plain(plan, matrix)
    half = plan.halves.layer
    if half is None:
        dense = Tensor("weight", matrix.shape, trainable=True)
        return _unit(plan, matrix, (dense,), Saved(), {}, targeted=True)
    settings, tokens = plan.layer_settings, plan.positions
    return _unit(
        plan,
        matrix,
        half.weights(matrix, settings),
        half.saved(matrix, tokens, settings),
        half.transient(matrix, tokens, settings),
        targeted=True,
    )


def _plain(plan: Plan, matrix: Matrix) -> Unit:
    """A parameter no method takes: dense, trained unless the plan freezes the rest."""
    weight = Tensor("weight", matrix.shape, trainable=not plan.freeze_rest)
    return _unit(plan, matrix, (weight,), Saved(), {}, targeted=False)


def _unit(
    plan: Plan,
    matrix: Matrix,
    tensors: tuple[Tensor, ...],
    saved: Saved,
    transient: Mapping[str, tuple[Tensor, ...]],
    *,
    targeted: bool,
) -> Unit:
    trained = tuple(
        _trained(plan, matrix, tensor, targeted=targeted) for tensor in tensors if tensor.trainable
    )
    layer_half = targeted and plan.halves.layer is not None
    return Unit(matrix, targeted, layer_half, tensors, saved, transient, trained)


def _trained(plan: Plan, matrix: Matrix, tensor: Tensor, *, targeted: bool) -> Trained:
    flat = len(tensor.shape) == 1
    own = Matrix(
        f"{matrix.name} {tensor.name}",
        tensor.shape[0],
        1 if flat else tensor.shape[1],
        matrix.kind,
        matrix.layer,
        matrix.heads,
        flat=flat,
    )
    kind = ("bias" if flat else "linear") if targeted else matrix.kind
    if kind not in ("linear", "embedding", "head", "norm", "bias"):
        kind = "linear"  # an untargeted projection
    method = plan.halves
    covered = kind in method.update.COVERS and (targeted or kind != "linear")
    half: UpdateHalf = method.update if covered else registry.rest()
    settings = plan.optimizer_settings if covered else plan.rest_settings
    # torch's AdamW refuses moments in another dtype than the weight's.
    hosted = hasattr(half, "TORCH_OPTIMIZER") and plan.state_dtype == "same"
    transient = half.transient(own, plan.positions, settings)
    return Trained(tensor, own, covered, hosted, half.state(own, settings), transient)
