"""Notices optimizers that step an adapter without its engine, such as one that was created to replace the attached one.

torch calls hooks that are registered for all optimizers around every step.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from scalora.rescale.moments import in_backward_pass, refuse_in_backward_pass


class WatchOfOtherOptimizers:
    """Warns once if another optimizer than the attached one steps a model's adapter.

    Watches until the model is gone, even if the engine and the optimizer that it is attached to are gone before. A
    wrapper that is an optimizer itself, and steps the attached one, is not another one.

    Args:
        model: the model; not kept alive.
        optimizer: the optimizer that the engine is attached to; not kept alive.
        factors: gives the names of the adapter's present parameters, by their ``id``.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, factors: Callable[[], dict[int, str]]) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._factors = factors
        self._own_steps = 0
        self._own_steps_before = 0
        self._watching = True
        _start_watching()
        _WATCHES[model] = self

    def stop(self) -> None:
        """Stop watching."""
        self._watching = False

    def before_step(self, optimizer: Optimizer) -> None:
        """Take note of a step that an optimizer is about to take.

        Args:
            optimizer: any optimizer.

        Raises:
            UnsupportedOptimizerError: another optimizer steps the adapter during the backward pass.
        """
        if optimizer is self._optimizer():
            self._own_steps += 1
            return
        self._own_steps_before = self._own_steps
        if self._watching and in_backward_pass() and self._stepped_by(optimizer) is not None:
            refuse_in_backward_pass(type(optimizer).__name__)

    def after_step(self, optimizer: Optimizer) -> None:
        """Warn if an optimizer has taken a step that it should not have.

        Args:
            optimizer: any optimizer.
        """
        if not self._watching or optimizer is self._optimizer() or self._own_steps > self._own_steps_before:
            return
        if (name := self._stepped_by(optimizer)) is not None:
            self.stop()
            warnings.warn(
                f"{type(optimizer).__name__} has updated {name!r}, but ScaLoRA is attached to another optimizer, and "
                "rescales nothing in such steps: after replacing an optimizer, attach again with "
                "ScaLora(model, optimizer)",
                stacklevel=5,
            )

    def _stepped_by(self, optimizer: Optimizer) -> str | None:
        """The name of a factor that an optimizer holds; None if it holds none."""
        factors = self._factors()  # looked up each time: conversions of a model may replace them
        held = (id(p) for group in optimizer.param_groups for p in group["params"])
        return next((factors[parameter] for parameter in held if parameter in factors), None)


# The last watch of each model, which goes with it.
_WATCHES: weakref.WeakKeyDictionary[nn.Module, WatchOfOtherOptimizers] = weakref.WeakKeyDictionary()


@cache
def _start_watching() -> None:
    """Register the hooks, once and for all: while torch calls hooks, none may be removed."""

    def before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for watch in list(_WATCHES.values()):
            watch.before_step(optimizer)

    def after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for watch in list(_WATCHES.values()):
            watch.after_step(optimizer)

    # Compiled steps call them, but are not compiled together with them.
    register_optimizer_step_pre_hook(torch.compiler.disable(before_step))  # type: ignore[no-untyped-call]
    register_optimizer_step_post_hook(torch.compiler.disable(after_step))  # type: ignore[no-untyped-call]
