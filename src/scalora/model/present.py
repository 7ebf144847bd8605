"""Whether layers and optimizer still hold the parameters that an engine was attached to.

Conversions that overwrite modules, ``load_state_dict(assign=True)`` and edits of an optimizer's groups replace them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import Tensor
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
        for key, factor in (("lora_A", pair.lora_A), ("lora_B", pair.lora_B)):
            if id(factor) not in held:
                raise ValueError(
                    f"the optimizer does not hold {key} of module {pair.name!r} any more: attach again, with "
                    "ScaLora(model, optimizer), after its parameters have been changed"
                )


def _check_layer(pair: LoraPair) -> None:
    lora_A, lora_B = factors_of(pair.layer, pair.adapter)
    found: list[tuple[str, Tensor, Tensor]] = [("lora_A", pair.lora_A, lora_A), ("lora_B", pair.lora_B, lora_B)]
    if isinstance(pair.remainder, DenseRemainder):
        found.append(("base weight", pair.weight, getattr(pair.layer.get_base_layer(), weight_key(pair.layer))))
    for key, own, now in found:
        if own is not now and not pair.is_sharded:  # with FSDP2 the layers hold whole ones at times
            refuse(
                pair.name,
                f"its {key} has been replaced by another parameter since ScaLoRA was attached",
                "attach again, with ScaLora(model, optimizer), to an optimizer of the present parameters",
            )
