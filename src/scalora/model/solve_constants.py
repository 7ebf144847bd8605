"""What the solve for a rescale takes besides factors and gradients, as tensors on the device."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scalora.config import ScaLoraConfig
from scalora.maths.scaling import solver_dtype
from scalora.model.adapters import LoraPair
from scalora.model.target_norms import Rates, target_norms


class SolveConstants(NamedTuple):
    """Constants of layers of one rank, with an entry for each expert of those that are stacks of experts.

    Attributes:
        target_norms: the target norms for α and β of each layer.
        scaling: PEFT's scaling of each layer.
        merge_scaling: what a layer's remainder is added at.
    """

    target_norms: Float[Tensor, "layers 2"]
    scaling: Float[Tensor, "layers 1"]
    merge_scaling: Float[Tensor, "layers 1"]


class ConstantsOnDevice:
    """The constants of the layers of one rank, copied to the device only when one of them has changed.

    Args:
        shapes: the layers, on one device, in lists of equal shapes.
        config: the settings.
    """

    def __init__(self, shapes: list[list[LoraPair]], config: ScaLoraConfig) -> None:
        self._pairs = [pair for pairs in shapes for pair in pairs]
        self._config = config
        starts = itertools.accumulate((pair.experts for pair in self._pairs), initial=0)
        self._places = {
            pair.name: range(start, start + pair.experts) for pair, start in zip(self._pairs, starts, strict=False)
        }
        self._followed_from: tuple[Mapping[str, Rates], list[tuple[float, float]]] | None = None
        self._of_all: SolveConstants | None = None

    def of(self, active: list[LoraPair], rates: Mapping[str, Rates]) -> SolveConstants:
        """The constants of some or all of the layers.

        Args:
            active: the layers that have gradients. In mixtures of experts, others at every step.
            rates: the base learning rates of all layers.
        """
        scalings = [(pair.scaling, pair.merge_scaling) for pair in self._pairs]
        if self._of_all is None or self._followed_from != (rates, scalings):
            self._of_all = self._on_device(scalings, rates)
            self._followed_from = dict(rates), scalings
        if len(active) == len(self._pairs):
            return self._of_all
        places = [place for pair in active for place in self._places[pair.name]]
        chosen = torch.tensor(places).to(self._of_all.scaling.device)
        return SolveConstants(*(column[chosen] for column in self._of_all))

    def _on_device(self, scalings: list[tuple[float, float]], rates: Mapping[str, Rates]) -> SolveConstants:
        """The constants of all layers."""
        norms = target_norms(self._pairs, rates, self._config)
        values = [
            of_pair
            for pair, of_scalings in zip(self._pairs, scalings, strict=True)
            for of_pair in [(norms[pair.name], *of_scalings)] * pair.experts
        ]
        device = self._pairs[0].lora_A.device
        columns = (torch.tensor(column, dtype=solver_dtype(device)) for column in zip(*values, strict=True))
        targets, scaling, merge_scaling = (column.to(device) for column in columns)
        return SolveConstants(targets, scaling[:, None], merge_scaling[:, None])
