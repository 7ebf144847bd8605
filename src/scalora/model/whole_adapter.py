"""An adapter and its factored remainder as one ordinary adapter of higher rank, without any approximation.

``s·(lora_B·lora_A + left·rightᵀ)`` is the product of the factors side by side. `scalora.saving.ordinary_adapter`
compresses it to the rank that it needs; this form costs nothing to make.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig
from torch import nn

from scalora.model.layers import configured_scaling, pattern_key, pattern_of
from scalora.model.remainder_layer import RemainderLayer
from scalora.rescale.remainder import FactoredRemainder


def remainder_layers(model: nn.Module, adapter: str | None = None) -> dict[str, RemainderLayer]:
    """The layers of a model that have a remainder, by name.

    Args:
        model: the model.
        adapter: the adapter that the remainders belong to; None for any.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, RemainderLayer) and adapter in (None, module.trained_adapter)
    }


def whole_config(config: LoraConfig, layers: Mapping[str, RemainderLayer]) -> LoraConfig:
    """The configuration of an ordinary adapter with the whole update.

    Args:
        config: the adapter's own configuration.
        layers: its layers, by their names in the base model.
    """
    ranks, scalings = {}, {}
    for name, layer in layers.items():
        columns = layer.remainder.nonzero[0].shape[-1] if isinstance(layer.remainder, FactoredRemainder) else 0
        key = pattern_key(name, layer)
        ranks[key] = layer.r[layer.trained_adapter] + columns
        scalings[key] = configured_scaling(layer, layer.trained_adapter)
    return with_ranks(config, ranks, scalings)


def with_ranks(config: LoraConfig, ranks: Mapping[str, int], scalings: Mapping[str, float]) -> LoraConfig:
    """A configuration in which all layers have given ranks and scalings.

    Args:
        config: the configuration to begin with; not modified.
        ranks: the rank of each layer, by its `pattern_key`.
        scalings: the scaling of each layer.
    """
    alphas = {key: _whole_number(scalings[key] * rank) for key, rank in ranks.items()}
    rank, alpha = max(ranks.values()), max(alphas.values())
    whole = copy.copy(config)
    whole.__class__ = LoraConfig
    whole.r, whole.lora_alpha = rank, alpha
    whole.rank_pattern = {pattern_of(key, ranks): own for key, own in ranks.items() if own != rank}
    whole.alpha_pattern = {pattern_of(key, alphas): own for key, own in alphas.items() if own != alpha}
    whole.use_rslora, whole.init_lora_weights = False, True
    return whole


def _whole_number(alpha: float) -> int | float:
    """An int where there is one, as PEFT declares it."""
    return int(alpha) if alpha.is_integer() else alpha


class WholeUpdateConfig(LoraConfig):  # type: ignore[misc]
    """A configuration that is written as that of the whole update.

    Transformers' own adapters (``model.add_adapter``) are saved without a PeftModel: the tensors are those of
    `RemainderLayer.whole_factors`, and the configuration is the live one.
    """

    _layers: Mapping[str, RemainderLayer]

    def to_dict(self) -> dict[str, Any]:
        """What is written to adapter_config.json."""
        layers = {name: layer for name, layer in self._layers.items() if layer.has_remainder}
        config = whole_config(self, self._layers) if layers else self
        content: dict[str, Any] = LoraConfig.to_dict(config)
        return content


def write_as_whole(config: LoraConfig, layers: Mapping[str, RemainderLayer]) -> None:
    """Have a live configuration written as that of the whole update.

    Args:
        config: the adapter's configuration; modified.
        layers: its layers, by their names in the base model.
    """
    config.__class__ = WholeUpdateConfig
    config._layers = layers
