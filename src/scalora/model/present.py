"""Whether layers and optimizer still hold the parameters that an engine was attached to.

Conversions that overwrite modules, ``load_state_dict(assign=True)`` and edits of an optimizer's groups replace them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer

from scalora.model.adapters import LoraPair, refuse
from scalora.model.layers import factors_of, weight_key
from scalora.rescale.remainder import DenseRemainder


def present_factors(pairs: list[LoraPair]) -> Callable[[], dict[int, str]]:
    """A function that looks up the factors as they are when it is called: their names by ``id``.

    Args:
        pairs: the LoRA pairs; neither they nor their layers are kept alive.
    """
    known = [(pair.keys, weakref.ref(pair.layer), pair.adapter) for pair in pairs]

    def look_up() -> dict[int, str]:
        present: dict[int, str] = {}
        for keys, of_layer, adapter in known:
            layer = of_layer()
            if layer is not None and (adapter in layer.lora_A or adapter in layer.lora_embedding_A):
                present |= {id(p): key for p, key in zip(factors_of(layer, adapter), keys, strict=True)}
        return present

    return look_up


def check_present(pairs: list[LoraPair], optimizer: Optimizer) -> None:
    """Check that a rescale would change what the model computes with and the optimizer steps.

    Args:
        pairs: the LoRA pairs, with remainders.
        optimizer: the optimizer that ScaLoRA is attached to.

    Raises:
        UnsupportedLayerError: a layer has other parameters than the pair.
        ValueError: the optimizer does not hold a factor.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for pair in pairs:
        _check_layer(pair)
        if id(pair.lora_A) not in held or id(pair.lora_B) not in held:
            key = "lora_B" if id(pair.lora_A) in held else "lora_A"
            raise ValueError(
                f"the optimizer does not hold {key} of module {pair.name!r} any more: attach again, with "
                "ScaLora(model, optimizer), after its parameters have been changed"
            )


def _check_layer(pair: LoraPair) -> None:
    lora_A, lora_B = factors_of(pair.layer, pair.adapter)
    weight = pair.weight
    if isinstance(pair.remainder, DenseRemainder):
        weight = getattr(_base_layer(pair.layer), weight_key(pair.layer))
    if lora_A is pair.lora_A and lora_B is pair.lora_B and weight is pair.weight:
        return
    if pair.is_sharded:  # with FSDP2 the layers hold whole ones at times
        return
    for key, own, now in (
        ("lora_A", pair.lora_A, lora_A),
        ("lora_B", pair.lora_B, lora_B),
        ("base weight", pair.weight, weight),
    ):
        if own is not now:
            refuse(
                pair.name,
                f"its {key} has been replaced by another parameter since ScaLoRA was attached",
                "attach again, with ScaLora(model, optimizer), to an optimizer of the present parameters",
            )


def _base_layer(layer: nn.Module) -> nn.Module:
    """PEFT's ``get_base_layer``, in a fifth of the time: `hasattr` of a module that lacks an attribute is slow."""
    while (inner := layer._modules.get("base_layer")) is not None:
        layer = inner
    return layer
