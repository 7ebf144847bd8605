"""Target norms ``1/(s·√(Lη))`` of each layer, from the optimizer's base learning rates (paper, section 3).

The base learning rate η of a parameter is the highest that its group is known to have:

- its ``initial_lr``, which schedulers keep from before they changed the rate, or its ``max_lr`` (`OneCycleLR`);
- without either, the rate at the time that ScaLoRA was attached; or, if all groups have one rate, the one that the
  optimizer was built with, if that is higher (`ReduceLROnPlateau`, whose resumed run begins with a reduced rate);
- the rate of any step with a rescale so far (`CyclicLR`, whose groups say nothing of its peak).

With the scheduled rate instead, a decay to zero would make the factors explode.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from scalora.config import ScaLoraConfig
from scalora.maths.weight_steps import norm_for_turn
from scalora.model.adapters import LoraPair


@runtime_checkable
class HasGroups(Protocol):
    """What the base learning rates are read from: an optimizer, or what stands for one."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups, with the model's parameters."""

    @property
    def defaults(self) -> dict[str, Any]:
        """What the optimizer was built with."""


Rates = tuple[float, float]
"""The base learning rates of a layer's lora_A and lora_B."""


class BaseRates:
    """The base learning rates of all layers, from when ScaLoRA is attached to the end of the run.

    Args:
        pairs: the LoRA pairs of one model.
        optimizer: the optimizer of their parameters, or what stands for it.

    Raises:
        ValueError: the optimizer does not hold an adapter parameter.
    """

    def __init__(self, pairs: list[LoraPair], optimizer: HasGroups) -> None:
        self._pairs = pairs
        self._optimizer = optimizer
        self._at_attach = self._read(self._unscheduled)
        self._highest: dict[str, Rates] = {}

    def current(self) -> dict[str, Rates]:
        """The base learning rates by now, by the layer's name. A scheduler may have been added since attaching."""
        rates = {}
        for name, peaks in self._read(_peak_of_schedule).items():
            at_attach, highest = self._at_attach[name], self._highest.get(name, (0.0, 0.0))
            of_A, of_B = (base if peak is None else peak for peak, base in zip(peaks, at_attach, strict=True))
            rates[name] = (max(of_A, highest[0]), max(of_B, highest[1]))
        return rates

    def observe(self) -> None:
        """Take in the rates of the step that the optimizer is about to take."""
        for name, rates in self._read(_rate).items():
            known = self._highest.get(name, rates)
            self._highest[name] = (max(known[0], rates[0]), max(known[1], rates[1]))

    def restore(self, saved: Mapping[str, Any] | None) -> None:
        """Continue from the base learning rates of a saved run.

        Args:
            saved: what `current` was then; None if that is not known: then from the optimizer's rates as they are now.
        """
        self._at_attach, self._highest = self._read(self._unscheduled), {}
        for name, rates in (saved or {}).items():
            if name in self._at_attach:
                self._at_attach[name] = self._highest[name] = (float(rates[0]), float(rates[1]))

    def _unscheduled(self, group: Mapping[str, Any]) -> float:
        """The rate of a group before any schedule changed it, as far as the optimizer tells."""
        rates = {_rate(each) for each in self._optimizer.param_groups}
        built_with = self._optimizer.defaults.get("lr")
        return max(_rate(group), float(built_with)) if built_with is not None and len(rates) == 1 else _rate(group)

    def _read(self, what: Any) -> dict[str, Any]:
        """Something of the groups of each layer's lora_A and lora_B, by the layer's name."""
        # Looked up anew each time: loading a state replaces the groups.
        of_parameter: dict[int, Any] = {}
        for group in self._optimizer.param_groups:
            of_parameter |= dict.fromkeys(map(id, group["params"]), what(group))
        read = {}
        for pair in self._pairs:
            of_A, of_B = id(pair.lora_A), id(pair.lora_B)
            if of_A not in of_parameter or of_B not in of_parameter:
                key = "lora_B" if of_A in of_parameter else "lora_A"
                raise ValueError(
                    f"the optimizer does not hold {key} of module {pair.name!r}: create it from this model's parameters"
                )
            read[pair.name] = of_parameter[of_A], of_parameter[of_B]
        return read


def target_norms(pairs: list[LoraPair], rates: Mapping[str, Rates], config: ScaLoraConfig) -> dict[str, Rates]:
    """The target norms of layers, with their scalings as they are now.

    Args:
        pairs: LoRA pairs.
        rates: the base learning rates of their parameters, from `BaseRates`; used only with `smoothness` or `turn`.
        config: the settings, with `target_norm`, `smoothness` or `turn`.

    Returns:
        For each layer's name, the target norm for α and the one for β.

    Raises:
        ValueError: `smoothness` or `turn` determines the norms, and a base learning rate is not positive.
    """
    return {pair.name: _target_norms(pair, rates[pair.name], config) for pair in pairs}


def _target_norms(pair: LoraPair, rates: Rates, config: ScaLoraConfig) -> tuple[float, float]:
    # α's term of the loss bound, aᵢ(Gᵀaᵢ)ᵀ, comes from the step on B, so it belongs to the learning rate of lora_A.
    for rate in rates:
        if config.norm_from_rates and not rate > 0:
            key = f"turn={config.turn}" if config.norm_from_turn else f"smoothness={config.smoothness}"
            raise ValueError(
                f"{key} needs a positive base learning rate, but it is {rate} for module {pair.name!r}: set it before "
                "attaching ScaLoRA, or give target_norm instead"
            )
    # With a scaling of 0 the layer has no gradient and is left alone, whatever its target.
    scaling = abs(pair.scaling) or 1.0
    if config.norm_from_turn:
        of_A, of_B = (norm_for_turn(config.turn, rate, scaling, pair.m, pair.n, pair.r) for rate in rates)
        return of_A, of_B
    return config.column_norm(scaling, rates[0]), config.column_norm(scaling, rates[1])


def _rate(group: Mapping[str, Any]) -> float:
    return float(group["lr"])


def _peak_of_schedule(group: Mapping[str, Any]) -> float | None:
    """The highest rate that a scheduler has noted down in a group; None if none has."""
    peaks = [float(group[key]) for key in ("initial_lr", "max_lr") if group.get(key) is not None]
    return max(peaks, default=None)
