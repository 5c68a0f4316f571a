"""The one optimizer class that hosts every method's update half."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from effprof import registry
from effprof.registry import Clock, Group
from effprof.registry import Tensor as Declared
from effprof.step import Step, Trained
from effprof.trainer.layer import DTYPES

_IMPLEMENTATION = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "loop": {"foreach": False},
}


class MethodOptimizer(torch.optim.Optimizer):
    """Updates each tensor as the plan says: torch's own optimizer where a half names one, the
    method's function else.

    ``param_groups`` has one group for what torch updates and one for what the method does;
    learning-rate schedulers set ``lr`` in each. ``clock`` counts updates and is part of
    ``state_dict()``.
    """

    def __init__(
        self,
        step: Step,
        parameters: Iterable[tuple[nn.Parameter, Trained]],
        lr: float,
        *,
        seed: int = 0,
    ) -> None:
        self.clock = Clock(seed=seed, lr=lr)
        self._step, self._method = step, step.plan.halves
        hosted: list[nn.Parameter] = []
        own: list[nn.Parameter] = []
        self._trained: dict[nn.Parameter, Trained] = {}
        for parameter, trained in parameters:
            (hosted if trained.hosted else own).append(parameter)
            self._trained[parameter] = trained
        groups = [
            {"params": members, "hosted": members is hosted} for members in (hosted, own) if members
        ]
        super().__init__(groups, {"lr": lr})
        self._torch = self._host(lr) if hosted else None

    def _host(self, lr: float) -> torch.optim.Optimizer:
        """torch's optimizer over the hosted group, sharing this one's group and state."""
        plan = self._step.plan
        group = next(g for g in self.param_groups if g["hosted"])
        half: Any = self._method.update if self._method.hosted else registry.rest()
        settings = plan.optimizer_settings if self._method.hosted else plan.rest_settings
        kind: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, half.TORCH_OPTIMIZER)
        inner = kind(
            group["params"],
            lr=lr,
            **half.torch_settings(settings),
            **_IMPLEMENTATION[plan.optimizer_impl],
        )
        for key, value in inner.param_groups[0].items():
            group.setdefault(key, value)
        self._link(inner)
        return inner

    def _link(self, inner: torch.optim.Optimizer) -> None:
        inner.param_groups = [g for g in self.param_groups if g["hosted"]]
        inner.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of everything that has a gradient.

        Then the method's own events, and the clock.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._torch is not None:
            self._torch.step()
        for group in self.param_groups:
            if not group["hosted"]:
                self.clock.lr = float(group["lr"])
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter)
        self.clock.update += 1
        self.clock.since_restart += 1
        return loss

    def _update(self, parameter: nn.Parameter) -> None:
        trained = self._trained[parameter]
        state = self.state[parameter]
        if not state:
            state.update({d.name: self._zeros(d, parameter) for d in trained.state})
        half: Any = self._method.update if trained.covered else registry.rest()
        plan = self._step.plan
        settings = plan.optimizer_settings if trained.covered else plan.rest_settings
        assert parameter.grad is not None
        group = Group(trained.matrix, {"weight": parameter}, {"weight": parameter.grad}, state)
        half.update(group, self.clock, settings)

    def _zeros(self, declared: Declared, parameter: Tensor) -> Tensor:
        dtype = DTYPES[self._step.dtype(declared.dtype)]
        return torch.zeros(declared.shape, dtype=dtype, device=parameter.device)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "clock": asdict(self.clock)}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore groups, state and clock.

        Unlike torch's, it keeps each state tensor's own dtype.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.state.clear()
        for index, values in state_dict["state"].items():
            parameter = parameters[int(index)]
            self.state[parameter] = {
                name: value.detach().clone().to(self._home(name, parameter))
                for name, value in values.items()
            }
        for group, loaded in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in loaded.items() if key != "params"})
        self.clock = Clock(**state_dict["clock"])
        if self._torch is not None:
            self._link(self._torch)

    def _home(self, name: str, parameter: nn.Parameter) -> torch.device:
        """Where a state tensor lives: torch reads its step counters on the CPU unless fused."""
        counted = self._trained[parameter].hosted and self._step.plan.optimizer_impl != "fused"
        return torch.device("cpu") if counted and name == "step" else parameter.device
