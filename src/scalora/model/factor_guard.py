"""Recognises adapter factors that something other than an optimizer has overwritten.

A remainder belongs to the factors that it was split off from. Rescales change the factors' coordinates, so factors of
another moment (an average of weights, a copy that is swapped in for evaluation, a hot-swapped adapter) make another
model together with the present remainder, not the one that they were taken from. Nothing in PyTorch tells that a tensor
was overwritten through ``.data``, as most of these do, so the factors' norms are compared.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

# Steps of optimizers are the one thing that may change factors. One hook serves all models.
_GUARDS: weakref.WeakSet[FactorGuard] = weakref.WeakSet()


class ChangedFactorsError(RuntimeError):
    """The factors of an adapter do not belong to its remainder any more. The message says what to do."""


@runtime_checkable
class Guarded(Protocol):
    """What a `FactorGuard` needs of a layer."""

    @property
    def trained_factors(self) -> tuple[Tensor, Tensor]:
        """PEFT's lora_A and lora_B of the adapter that ScaLoRA trains."""

    @property
    def trained_scaling(self) -> float:
        """The adapter's scaling."""

    @property
    def has_remainder(self) -> bool:
        """Whether anything has been added to the layer's remainder."""


class FactorGuard:
    """Remembers the norms and scalings of the factors of a model's layers, as the last optimizer step left them.

    Args:
        layers: the layers, at least one. Not copied.
    """

    def __init__(self, layers: Sequence[Guarded]) -> None:
        self._layers = layers
        self._parts_of: tuple[Callable[[Tensor], Tensor], list[Tensor]] | None = None
        self.forget()
        _watch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Watch the steps of the optimizers of a copied or unpickled model, too."""
        self.__dict__.update(state)
        _watch(self)

    @property
    def leader(self) -> Guarded:
        """The layer that has the check made in its forward pass, for all of them."""
        return self._layers[0]

    def watch_parts(self, factors: list[Tensor], part: Callable[[Tensor], Tensor]) -> None:
        """Look at this process's part of factors that are split over processes. The layers hold whole ones at times.

        Args:
            factors: the factors of all layers.
            part: gives this process's part of one, in the same memory.
        """
        self._parts_of = part, factors
        self.forget()

    def retire(self) -> None:
        """Stop watching: the adapter is being deleted."""
        _GUARDS.discard(self)

    def follow(self) -> None:
        """Trust the factors at the next check if they are other parameters, as ScaLoRA is attached to these anew."""
        if self._parts_of is None and self._factors:
            present = self._present_factors()
            if any(now is not before for now, before in zip(present, self._factors, strict=True)):
                self.forget()

    def forget(self) -> None:
        """Trust the factors as they are at the next check."""
        self._factors: list[Tensor] = []
        self._norms: list[Tensor] | None = None
        self._scalings: list[float] = []

    def forget_values(self) -> None:
        """Trust the values that the factors have at the next check."""
        self._norms = None

    @torch.no_grad()
    def record(self) -> None:
        """Trust the factors as they are now. Does not wait for the device."""
        self._factors = self._factors or self._present_factors()  # to look them up again takes longer than their norms
        self._norms = list(torch._foreach_norm(self._factors))
        self._scalings = [layer.trained_scaling for layer in self._layers]

    @torch.no_grad()
    def check(self) -> None:
        """Check that nothing has overwritten the factors since the last step. Waits for the device.

        Raises:
            ChangedFactorsError: something has.
        """
        if self._norms is None:
            self.forget()  # they may be other parameters
            self.record()
            return
        factors = self._present_factors() if self._parts_of is None else self._factors
        by_device: dict[torch.device, list[Tensor]] = {}
        for now, before in zip(torch._foreach_norm(factors), self._norms, strict=True):
            by_device.setdefault(now.device, []).append((now != before) & ~(now.isnan() & before.isnan()))
        replaced = any(now is not before for now, before in zip(factors, self._factors, strict=True))
        if replaced or any(torch.stack(changed).any().item() for changed in by_device.values()):
            raise ChangedFactorsError(
                "lora_A or lora_B has been overwritten since the optimizer's last step (by an average of weights, a "
                "hot-swapped adapter, a copy from another step?), but the part of the update that ScaLoRA has merged "
                "belongs to the factors that were there: average with scalora.ModelEma, swap models made by "
                "merge_and_unload() or adapters written by save_pretrained(), or call scalora.accept_factors(model) if "
                "the change was meant"
            )

    @property
    def scalings_differ(self) -> bool:
        """Whether PEFT's scalings have been changed since the last step."""
        return bool(self._scalings) and self._scalings != [layer.trained_scaling for layer in self._layers]

    def _present_factors(self) -> list[Tensor]:
        if self._parts_of is not None:
            part, factors = self._parts_of
            return [part(factor) for factor in factors]
        return [factor for layer in self._layers for factor in layer.trained_factors]

    def after_step(self, optimizer: Optimizer) -> None:
        """Trust what a step of an optimizer has changed, if the optimizer holds any of the factors.

        Args:
            optimizer: any optimizer.
        """
        if not self.leader.has_remainder:
            return
        own = {id(factor) for factor in (self._parts_of[1] if self._parts_of else self.leader.trained_factors)}
        if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            self.record()


def _watch(guard: FactorGuard) -> None:
    _start_watching()
    _GUARDS.add(guard)


@cache
def _start_watching() -> None:
    """Register the hook, once and for all: while torch calls hooks, none may be removed."""

    def after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for guard in list(_GUARDS):
            guard.after_step(optimizer)

    register_optimizer_step_post_hook(after_step)
