"""The methods: every file in ``methods/`` is one, its name is the method's name.

A method comes in two halves. The *layer half* says what replaces a weight matrix and how it
multiplies; the *update half* says what the optimizer keeps per tensor and how it moves it. A file
that has only a layer half names the other's file, ``UPDATE = full``; one without a layer half keeps
torch's Linear.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

from effprof.errors import UsageError, unknown
from effprof.model import Matrix

if TYPE_CHECKING:
    from torch import Tensor as TorchTensor

PACKAGE = "effprof.methods"
KINDS = ("linear", "embedding", "head", "norm", "bias")  # of tensors that an update half can take
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "int32": 4, "int64": 8, "uint8": 1}
INTEGERS = ("int32", "int64", "uint8")

# bitsandbytes' block-wise states: one fp32 maximum per 256 numbers (since 0.44), and tensors of
# fewer than 4096 numbers stay fp32.
QUANTISED_BLOCK = 256
QUANTISED_FROM = 4096
ABSMAX = ".absmax"
MASTER = "master_weight"  # the state that is an fp32 copy of a tensor, under this or a longer name


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor a method declares.

    ``dtype`` is a name in ITEMSIZE, or ``weight`` (the plan's parameter dtype), ``compute`` (what
    matrix products run in) or ``state`` (the plan's optimizer-state dtype), which the Step
    resolves. Some name copies that are not always made: ``upcast``, fp32 beside weights of another
    dtype; ``recast``, fp32, and ``downcast``, in the weights' dtype, where states have another than
    weights; ``mixed`` and ``remixed``, as upcast and recast, where the CPU casts an operand that a
    CUDA kernel reads as it is (TensorIterator's common dtype). ``role`` is
    weights, buffers, optimizer, activations or workspace. A trainable tensor gets a gradient of its
    own shape, in the compute dtype where it holds integers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "weight"
    role: str = "weights"
    trainable: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Saved:
    """What a layer keeps for its backward: its input, and other tensors by declaration."""

    input: bool = True
    extra: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs by named part (a multiply-add counts 2).

    ``forward``, ``backward`` and ``update`` are matrix products and equal torch's FlopCounterMode;
    ``elementwise`` is the rest of one update by formula, ``periodic`` the rare work (an SVD)
    divided by how often it runs.
    """

    forward: Mapping[str, int] = field(default_factory=dict)
    backward: Mapping[str, int] = field(default_factory=dict)
    update: Mapping[str, int] = field(default_factory=dict)
    elementwise: Mapping[str, int] = field(default_factory=dict)
    periodic: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Facts:
    """Where a method comes from and where this implementation deviates.

    ``defaults`` holds published settings by model size; ``lr`` learning rates by size, published or
    a starting point.
    ``convention`` names the rule of published memory tables (bf16, weights + optimizer, decimal GB)
    or is empty where there is none.
    """

    title: str
    summary: str
    paper: str
    equations: str
    reference: str
    deviations: tuple[str, ...]
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    lr: Mapping[str, float] = field(default_factory=dict)
    convention: str = ""


@dataclass(slots=True)
class Clock:
    """Where a run is: ``update`` counts finished optimizer updates, ``lr`` is this update's
    learning rate, ``since_restart`` counts updates since the last restart (of the run, if none).
    """

    update: int = 0
    total_updates: int = 0
    lr: float = 0.0
    since_restart: int = 0
    seed: int = 0


@dataclass(slots=True)
class Group:
    """What is trained together: tensors, their gradients and optimizer state by name, changed in
    place.

    ``age`` counts the updates its state has seen since it began or was last reset: bias correction
    and schedules of a tensor's own read it. ``seed`` is this group's own; ``memory`` holds plain
    numbers it must remember (JSON), such as a schedule that it changed.
    """

    matrix: Matrix
    tensors: dict[str, TorchTensor]
    gradients: dict[str, TorchTensor]
    state: dict[str, TorchTensor]
    age: int = 0
    seed: int = 0
    memory: dict[str, Any] = field(default_factory=dict)

    def reset(self) -> None:
        """Zero the state in place, as if the next update were the first; master weights stay."""
        for name, tensor in self.state.items():
            if not name.startswith(MASTER):
                tensor.zero_()
        self.age = 0
        self.memory.clear()

    def release(self) -> None:
        """Free the state; an update of this group allocates it again."""
        self.state.clear()
        self.age = 0
        self.memory.clear()


@dataclass(slots=True)
class Layer:
    """One replaced matrix after an update: all its tensors by name, trained or not, and the groups
    that train some of them (one per tensor by that tensor's name, or one for all).
    """

    matrix: Matrix
    tensors: dict[str, TorchTensor]
    groups: dict[str, Group]
    seed: int


class LayerHalf(Protocol):
    """What replaces a weight matrix, in the contract's order.

    ``settings`` is an instance of ``Settings``.
    """

    FACTS: Facts
    Settings: type[Any]

    def weights(self, matrix: Matrix, settings: Any, /) -> tuple[Tensor, ...]: ...
    def saved(self, matrix: Matrix, tokens: int, settings: Any, /) -> Saved: ...
    def flops(self, matrix: Matrix, tokens: int, settings: Any, /) -> Flops: ...
    def transient(
        self, matrix: Matrix, tokens: int, settings: Any, /
    ) -> Mapping[str, tuple[Tensor, ...]]: ...
    def init(
        self, matrix: Matrix, settings: Any, seed: int, dense: TorchTensor | None = None, /
    ) -> dict[str, TorchTensor]: ...
    def forward(
        self, x: TorchTensor, tensors: Mapping[str, TorchTensor], settings: Any, /
    ) -> tuple[TorchTensor, tuple[TorchTensor, ...]]: ...
    def backward(
        self,
        gradient: TorchTensor,
        x: TorchTensor | None,
        saved: Sequence[TorchTensor],
        tensors: Mapping[str, TorchTensor],
        settings: Any,
        /,
    ) -> tuple[TorchTensor, dict[str, TorchTensor]]: ...
    def dense(self, tensors: Mapping[str, TorchTensor], settings: Any, /) -> TorchTensor | None: ...

    # Optional, asked for through the functions at the end of this file or by the optimizer host:
    # after_step(layers, rest, clock, settings): merge, refactorize, reset, at the end of step();
    #   ``layers`` are the replaced matrices, ``rest`` every other group; ``clock.update`` already
    #   counts this update
    # active(matrices, clock, settings) -> which trained tensors need a gradient in this update
    # turns(matrices, settings): one update per set of active tensors, where they take turns
    # before_step(layers, clock, settings): between backward and the updates, with all gradients
    # differentiated(settings, update): which of the layer's own tensors have a gradient in it
    # lr_factor(clock, settings): multiplied onto the learning rate of every parameter
    # phases(settings, update), due(settings, layers): see the functions of these names below
    # edit(settings) -> fields of the Architecture that the method changes
    # PAPER_NUMBERS, PAPER_LEAVES_OUT_REST: published tables that count otherwise than what is kept
    # adapter(settings) -> PEFT's settings of a layer whose only trained tensors are A and B
    # STATE_DTYPE: the plan's default, where it is not ``same``
    # NO_LAYER_HALF: why an update half goes on no layer half
    # ONLY_OWN_UPDATE: why no other update half goes with the layers
    # NOT_PER_LAYER, NOT_8BIT, NOT_FREEZE_REST, NOT_WIDE: why the method does not go with that flag
    #   (NOT_WIDE: with --master-weights fp32 and --rounding stochastic)
    # LOCAL_START: why the first update of several processes is not quite that of one
    # STARTS_DENSE: the host passes the model's own initial matrix to ``init``


class UpdateHalf(Protocol):
    """What the optimizer keeps and does per trainable tensor, in the contract's order."""

    FACTS: Facts
    Settings: type[Any]
    COVERS: tuple[str, ...]

    def state(self, matrix: Matrix, settings: Any, /) -> tuple[Tensor, ...]: ...
    def flops(self, matrix: Matrix, tokens: int, settings: Any, /) -> Flops: ...
    def transient(
        self, matrix: Matrix, tokens: int, settings: Any, /
    ) -> Mapping[str, tuple[Tensor, ...]]: ...
    def update(self, group: Group, clock: Clock, settings: Any, /) -> None: ...

    # ``transient`` says what an update (or refresh) holds at once; a later stage that holds other
    # things is named ``update:stage``.
    # Optional: JOINT (one group per matrix of a layer half instead of one per tensor),
    # FUSED_BACKWARD (the method is defined by --per-layer-update), NATIVE_8BIT (``update`` reads
    # quantised states itself), and after_step, active, lr_factor, phases and due as above.


@dataclass(frozen=True)
class Method:
    """A layer half with an update half.

    ``layer`` is None for a dense matrix in torch's own ``nn.Linear``.
    """

    name: str
    layer: LayerHalf | None
    update: UpdateHalf
    update_name: str
    facts: Facts

    @property
    def addressed(self) -> LayerHalf | UpdateHalf:
        """The half that ``--rank`` and ``--set`` speak to."""
        return self.layer or self.update

    @property
    def hosted(self) -> str | None:
        """The torch optimizer this update half names, run as it is.

        None for an update of its own.
        """
        return getattr(self.update, "TORCH_OPTIMIZER", None)

    @property
    def one_file(self) -> bool:
        """Whether both halves are the same file's, which has one set of settings."""
        return self.layer is not None and cast("Any", self.layer) is self.update

    @property
    def covers_all(self) -> bool:
        """Whether the update half also takes what is no targeted matrix: AdamW has no rest then."""
        return {"embedding", "head", "norm"} <= set(self.update.COVERS)

    @property
    def joint(self) -> bool:
        """Whether the update half trains a layer's tensors together."""
        return self.layer is not None and bool(getattr(self.update, "JOINT", False))

    @property
    def fused_backward(self) -> bool:
        """Whether the method is defined by updating each tensor as backward produces it."""
        return bool(getattr(self.update, "FUSED_BACKWARD", False))


@functools.cache
def names() -> tuple[str, ...]:
    """Every method, by the name users type."""
    path = importlib.import_module(PACKAGE).__path__
    found = (module.name for module in pkgutil.iter_modules(path))
    return tuple(sorted(name.replace("_", "-") for name in found if not name.startswith("_")))


def default() -> str:
    """The method used where none is named."""
    return cast("str", importlib.import_module(PACKAGE).DEFAULT)


def rest() -> Any:
    """The update half of whatever a method's own update does not cover."""
    return _module(default())


@functools.cache
def _module(name: str) -> Any:
    stem = name.lower().replace("_", "-")
    if stem not in names():
        raise unknown("method", name, names(), "`effprof methods` lists them.")
    from effprof import contract

    file = stem.replace("-", "_")
    try:
        found = importlib.import_module(f"{PACKAGE}.{file}")
    except Exception as problem:  # whatever somebody's file does while it is read
        folders = importlib.import_module(PACKAGE).__path__
        raise contract.broken(list(folders), file, problem) from problem
    contract.check(found)
    return found


def method(name: str, update: str | None = None) -> Method:
    """The method of that name, with another update half where one is named. Raises UsageError."""
    file = _module(name)
    own_update = file if hasattr(file, "update") else file.UPDATE
    half = _module(update) if update else own_update
    if not hasattr(half, "update"):
        raise UsageError(
            f"{update} has no update half of its own.",
            f"Update halves: {', '.join(n for n in names() if hasattr(_module(n), 'update'))}.",
        )
    stem = half.__name__.rpartition(".")[2].replace("_", "-")
    return Method(
        name=file.__name__.rpartition(".")[2].replace("_", "-"),
        layer=cast("LayerHalf | None", file if hasattr(file, "forward") else None),
        update=cast("UpdateHalf", half),
        update_name=stem,
        facts=file.FACTS,
    )


def published_sizes(name: str, update: str = "") -> frozenset[str]:
    """The model sizes for which either half's settings are published."""
    chosen = method(name, update or None)
    return frozenset((*chosen.facts.defaults, *chosen.update.FACTS.defaults))


def setting_fields(half: LayerHalf | UpdateHalf) -> dict[str, dataclasses.Field[Any]]:
    """The settings a half reads, by name."""
    return {item.name: item for item in dataclasses.fields(half.Settings)}


def phases(half: Any, settings: Any, update: int) -> tuple[str, ...]:
    """What an update half does in the update of that number: ``refresh`` before ``update``, or not.

    A half says so itself, or names in PERIODS the settings that divide the updates of a refresh.
    """
    if hasattr(half, "phases"):
        return cast("tuple[str, ...]", half.phases(settings, update))
    if any(update % getattr(settings, name) == 0 for name in getattr(half, "PERIODS", ())):
        return ("refresh", "update")
    return ("update",)


def due(half: Any, settings: Any, layers: int) -> tuple[int, ...]:
    """The numbers of updates, after the first two, in which the half's periodic events happen.

    ``layers`` is how many decoder layers the model has.
    """
    if hasattr(half, "due"):
        found = half.due(settings, layers)
        return found if isinstance(found, tuple) else (found,)
    periods = getattr(half, "PERIODS", ())
    return (math.lcm(*(getattr(settings, name) for name in periods)),) if periods else ()
