"""trace(plan): the real step under fake tensors, as a tape, replayed as a GPU would run it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from effprof import blockwise, gpus, readers
from effprof.estimator.attention import plan_attention
from effprof.estimator.decoder import CPU_RNG_STATE
from effprof.estimator.estimate import Fit, fits, not_modelled
from effprof.estimator.memory import Memory, measure, no_collector
from effprof.gpus import Gpu
from effprof.phase import listening
from effprof.plan import Plan, check_alone
from effprof.step import work_out
from effprof.tape import Tape
from effprof.tracer.foreign import arranged_foreign, counted
from effprof.tracer.recorder import HOST, FakeRecorder
from effprof.tracer.repeat import MicroSteps
from effprof.tracer.rules import casts, rules
from effprof.trainer.apply import parameters_of
from effprof.trainer.batch import Batch
from effprof.trainer.build import arranged, trained_parameters
from effprof.trainer.layer import MethodLinear
from effprof.trainer.optimizer import MethodOptimizer
from effprof.trainer.step import training_step
from effprof.trainer.synthetic import random_batch

SCHEMA = "effprof.trace/1"
_ALONE = threading.Lock()
OnUpdate = Callable[[int, int], None]


@dataclass(frozen=True)
class Trace:
    """What a traced step holds.

    ``questions`` are values that fake tensors could not answer, with how often each was asked.
    """

    plan: Plan
    parameters: dict[str, int]
    memory: Memory
    questions: dict[str, int]
    seconds: float
    fits: tuple[Fit, ...]

    @property
    def tape(self) -> Tape:
        return self.memory.tape

    def as_dict(self) -> dict[str, Any]:
        """The JSON document: bytes, seconds; ``at_peak`` largest first, layers taken together."""
        peak, tape = self.memory.peak, self.tape
        phases = [
            {"update": s.update, "phase": s.phase, "peak": s.peak}
            for s in readers.spans(tape, self.memory.blocks)
        ]
        alive = readers.grouped(peak.alive).most_common()
        return {
            "schema": SCHEMA,
            "plan": self.plan.as_dict(),
            "parameters": self.parameters,
            "memory": self.memory.as_dict(),
            "at_peak": [{"role": r, "label": name, "bytes": n} for (r, name), n in alive],
            "phases": phases,
            "events": len(tape.events),
            "seconds": self.seconds,
            "assumed": self.questions,
            "fits": [fit.as_dict() for fit in self.fits],
            "not_modelled": list(not_modelled(self.plan)),
        }


def trace(plan: Plan, *, on_update: OnUpdate = lambda done, total: None) -> Trace:
    """Run a plan's updates under fake tensors and replay what they allocate.

    ``on_update`` is told how many updates are traced, and how many there are.

    One at a time in a process: transformers' and torch's own functions are replaced meanwhile (see
    ``_quiet``), so nothing else should train or trace in another thread.
    """
    check_alone(plan, "a trace")
    with _ALONE, torch.enable_grad():
        return _trace(plan, on_update)


def _trace(plan: Plan, on_update: OnUpdate) -> Trace:
    began = time.perf_counter()
    card = gpus.gpu(plan.gpu) if plan.gpu else gpus.DEFAULT
    recorder = FakeRecorder(rules(plan, card), casts if plan.device == "cpu" else None)
    with _quiet(plan), _kernel(plan, card), no_collector():
        tape, parameters = _run(plan, card, recorder, on_update)
    memory = measure(plan, tape, card)
    seconds = time.perf_counter() - began
    return Trace(plan, parameters, memory, recorder.questions, seconds, fits(plan, memory, card))


def _run(
    plan: Plan, card: Gpu, recorder: FakeRecorder, on_update: OnUpdate
) -> tuple[Tape, dict[str, int]]:
    """Build and update under a recorder; the tape ends with everything that a run keeps alive.

    Also how many parameters there are.
    """
    step = None if plan.architecture.foreign else work_out(plan)
    bare = arranged_foreign(plan) if step is None else arranged(step)
    parameters = counted(bare) if step is None else step.counts()
    batch = random_batch(plan, torch.device("cpu"))
    recorder.mark("build", "build")
    with recorder, listening(recorder.inner):
        model = _materialised(bare, plan)
        recorder.follow(model)
        layers = [module for module in model.modules() if isinstance(module, MethodLinear)]
        if step is None:
            trained = parameters_of(model, plan.recipe)
        else:
            trained = trained_parameters(step, model)
        optimizer = MethodOptimizer(plan.recipe, trained, 1e-3, layers=layers)
        recorder.name(dict(model.named_parameters()), "weights")
        recorder.name(dict(model.named_buffers()), "buffers")
        _watch_gradients(recorder, model, plan)
        if plan.device == "cuda":  # one cuBLAS workspace per thread that has a handle
            for thread in ("forward", "backward"):
                recorder.keep(card.workspace, f"cublas_{thread}")
        run = MicroSteps(recorder, model, plan)
        for done, (kind, number) in enumerate(plan.updates, 1):
            optimizer.seek(number)

            def on_phase(phase: str, kind: str = kind) -> None:
                if phase == "update":
                    recorder.name(run.gradients(), "gradients")
                recorder.mark(kind, phase)

            batches = [_faked(batch) for _ in range(min(plan.grad_accum, 2))]
            for one in batches:
                recorder.name({"input_ids": one.ids, "labels": one.labels}, "activations")
            training_step(model, optimizer, batches, plan, on_phase=on_phase, run=run)
            del batches
            recorder.name(_states(optimizer, model), "optimizer")
            if plan.device == "cuda":
                recorder.name(optimizer.host_states(), HOST)
            on_update(done, len(plan.updates))
        return recorder.finished(), parameters


def _watch_gradients(recorder: FakeRecorder, model: nn.Module, plan: Plan) -> None:
    """Name gradients that are gone before backward ends."""

    def hook(name: str, gradient: Tensor) -> None:
        recorder.name({name: gradient}, "gradients")

    for name, parameter in model.named_parameters() if plan.per_layer_update else ():
        if parameter.requires_grad:
            parameter.register_hook(functools.partial(hook, name))  # type: ignore[no-untyped-call]


def _states(optimizer: MethodOptimizer, model: nn.Module) -> dict[str, Tensor]:
    """Optimizer states by the name of the tensor they belong to."""
    names: dict[Tensor, str] = {one: name for name, one in model.named_parameters()}
    return {
        f"{names[parameter]}.{name}": tensor
        for parameter, state in optimizer.state.items()
        for name, tensor in state.items()
    }


def _materialised(model: nn.Module, plan: Plan) -> nn.Module:
    """A model on meta as fake tensors on the CPU; tied parameters stay one."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, one in list(module._parameters.items()):
            if one is None:
                continue
            if id(one) not in made:
                empty = torch.empty(one.shape, dtype=one.dtype)
                made[id(one)] = nn.Parameter(empty, requires_grad=one.requires_grad)
            module._parameters[name] = made[id(one)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    model.tie_weights()  # type: ignore[operator]
    if plan.checkpointing == "full":
        model.activation_checkpointing_enable()  # type: ignore[operator]
    for module in model.modules():  # said to be left out: the CPU has no fused kernel with it
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0  # type: ignore[assignment]
    return model.train()


def _faked(batch: Batch) -> Batch:
    """A batch of fake tensors; what is one tensor there is one here."""
    made: dict[int, Tensor] = {}

    def fake(one: Any) -> Any:
        if not isinstance(one, Tensor):
            return one
        if id(one) not in made:
            made[id(one)] = torch.empty(one.shape, dtype=one.dtype)
        return made[id(one)]

    fields = {item.name: fake(getattr(batch, item.name)) for item in dataclasses.fields(batch)}
    return dataclasses.replace(batch, **fields)


def _kernel(plan: Plan, card: Gpu) -> contextlib.AbstractContextManager[None]:
    """SDPA's math backend where no fused kernel of the card takes the plan's attention."""
    masked = plan.attention_mask == "full" or plan.rows == "packed-isolated"
    asked = plan_attention(plan, masked=masked)
    bf16 = plan.compute_dtype == "bf16"
    if plan.device == "cpu" or asked.kernel(card.capability, bf16=bf16) != "math":
        return contextlib.nullcontext()
    return cast("contextlib.AbstractContextManager[None]", sdpa_kernel(SDPBackend.MATH))


@contextlib.contextmanager
def _quiet(plan: Plan) -> Iterator[None]:
    """What fake tensors cannot tell is told, and 8-bit states are taken as on the GPU."""
    softmax = nn.functional.softmax
    random_states = torch.get_rng_state, torch.set_rng_state
    if plan.state_dtype == "8bit":
        for name in ("exp_avg", "exp_avg_sq"):
            blockwise.code(name, torch.device("cpu"))
    try:
        if plan.device == "cpu":  # a checkpoint keeps the generator's state, which is no fake
            torch.get_rng_state = lambda: torch.empty(CPU_RNG_STATE, dtype=torch.uint8)
            torch.set_rng_state = lambda new_state: None
        if plan.device == "cuda" and plan.compute_dtype == "fp16":
            nn.functional.softmax = _softmax_of_half  # type: ignore[assignment]
        with blockwise.as_on_gpu() if plan.device == "cuda" else contextlib.nullcontext():
            yield
    finally:
        nn.functional.softmax = softmax
        torch.get_rng_state, torch.set_rng_state = random_states


def _softmax_of_half(
    x: Tensor, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """CUDA's softmax reads fp16 and writes fp32; the CPU's is given a copy (SoftMax.cpp)."""
    if x.dtype == torch.float16 and dtype == torch.float32:
        return torch._softmax(x, dim, True)
    return torch.softmax(x, dim, dtype=dtype)
