"""Completes copies of an adapter that trainers make, factor by factor, for reference: TRL's ``ref``.

A copy of the factors of an adapter that has been trained with a factored remainder lacks the remainder. It is completed
to an ordinary adapter of higher rank, which is the model at the moment of the copy and stays it.
"""

from __future__ import annotations

import torch
from torch import nn

from scalora.model.layers import experts_of, factors_of
from scalora.model.remainder_layer import RemainderLayer
from scalora.model.roots import peft_model_of
from scalora.model.whole_adapter import remainder_layers, whole_config
from scalora.rescale.remainder import FactoredRemainder


@torch.no_grad()
def complete_copies(model: nn.Module) -> None:
    """Give adapters that are copies of the trained one's factors its remainder, too, if that is factored.

    Args:
        model: a model with PEFT LoRA layers, or a wrapper around it; copies in it are modified.

    Raises:
        UnsupportedLayerError: it contains more than one PeftModel.
    """
    peft_model = peft_model_of(model)
    if peft_model is None:
        return
    layers = remainder_layers(peft_model.base_model.model)
    if not any(layer.has_remainder and isinstance(layer.remainder, FactoredRemainder) for layer in layers.values()):
        return
    trained = next(iter(layers.values())).trained_adapter
    configurations = peft_model.peft_config
    for name in [name for name in configurations if name != trained]:
        if all(_is_copy(layer, name) for layer in layers.values()):
            for layer in layers.values():
                _complete(layer, name)
            whole = whole_config(configurations[trained], layers)
            whole.inference_mode = configurations[name].inference_mode
            configurations[name] = whole


def _is_copy(layer: RemainderLayer, name: str) -> bool:
    if name not in layer.lora_A and name not in layer.lora_embedding_A:
        return False
    pairs = zip(factors_of(layer, name), layer.trained_factors, strict=True)
    return all(copied.shape == own.shape and bool((copied == own).all()) for copied, own in pairs)


def _complete(layer: RemainderLayer, name: str) -> None:
    for copied, whole in zip(factors_of(layer, name), layer.whole_factors(), strict=True):
        copied.data = whole.to(copied)
    rows = len(factors_of(layer, name)[0])
    rank = rows // experts_of(layer)
    if name in layer.lora_A:
        layer.lora_A[name].out_features = layer.lora_B[name].in_features = rows
    layer.r[name], layer.lora_alpha[name] = rank, layer.trained_scaling * rank
    layer.scaling[name], layer.use_rslora[name] = layer.trained_scaling, False
