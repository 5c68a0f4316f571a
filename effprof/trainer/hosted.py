"""torch's own optimizers, run as they are over what a recipe leaves to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from effprof.recipe import Recipe

_IMPLEMENTATION = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "loop": {"foreach": False},
}


class Hosted:
    """torch's optimizers over the hosted group of ``host``, sharing its state: one for all, or one
    per parameter where each is updated in backward.
    """

    def __init__(self, recipe: Recipe, host: torch.optim.Optimizer, lr: float) -> None:
        self._host = host
        self._made = self._make(recipe, lr)
        self.link()

    def _make(self, recipe: Recipe, lr: float) -> dict[nn.Parameter | None, torch.optim.Optimizer]:
        """By parameter; under None the one for all. The group shows what torch would show."""
        group = self._group
        if group is None:
            return {}
        own = hasattr(recipe.halves.update, "TORCH_OPTIMIZER")
        half, settings = recipe.half(covered=own)
        kind: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, half.TORCH_OPTIMIZER)
        options = {**half.torch_settings(settings), **_IMPLEMENTATION[recipe.optimizer_impl]}
        if recipe.per_layer_update:
            made: dict[nn.Parameter | None, torch.optim.Optimizer] = {
                parameter: kind([parameter], lr=lr, **options) for parameter in group["params"]
            }
        else:
            made = {None: kind(group["params"], lr=lr, **options)}
        for key, value in next(iter(made.values())).param_groups[0].items():
            group.setdefault(key, value)
        return made

    @property
    def _group(self) -> dict[str, Any] | None:
        return next((one for one in self._host.param_groups if one["hosted"]), None)

    def link(self) -> None:
        """Share the host's group and state, which loading a state makes anew."""
        for parameter, inner in self._made.items():
            if parameter is None:
                inner.param_groups = [one for one in self._host.param_groups if one["hosted"]]
            inner.state = self._host.state

    def step(self, parameter: nn.Parameter | None, factor: float) -> None:
        """One update of a parameter, or under None of all, at the group's learning rate times
        ``factor``.
        """
        inner, shown = self._made.get(parameter), self._group
        if inner is None or shown is None:
            return
        (group,) = inner.param_groups
        before = shown["lr"]
        group["lr"] = before * factor
        inner.step()
        group["lr"] = before
