"""The whole update of a layer since the start of training, ``W_T − W_0 + s·A·Bᵀ`` (paper, section 6)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from scalora.maths.lowrank import Factors, factors_of_product
from scalora.model.adapters import LoraPair
from scalora.rescale.remainder import DenseRemainder, FactoredRemainder


def dense_update(
    pair: LoraPair,
    trained: DenseRemainder,
    weight: Tensor,
    base_weight: Tensor,
    lora_A: Float[Tensor, "r n"],
    lora_B: Float[Tensor, "m r"],
) -> Float[Tensor, "m n"]:
    """The update of a layer with a dense remainder, in float64.

    Args:
        pair: the layer; only its scaling and the storage order of its weight are used.
        trained: the layer's remainder, with the rounding errors of the trained weight.
        weight: the trained weight W_T, as stored.
        base_weight: the original weight W_0, as stored.
        lora_A: PEFT's ``lora_A.weight``, (r, n).
        lora_B: PEFT's ``lora_B.weight``, (m, r).
    """
    merged = pair.oriented(trained.exact(weight).double() - base_weight.double())
    return merged + pair.scaling * lora_B.double() @ lora_A.double()


def factored_update(pair: LoraPair) -> Factors:
    """The update of a layer with a factored remainder, ``s·A·Bᵀ`` plus the remainder, as an SVD in float64.

    Args:
        pair: the layer, with a factored remainder.
    """
    assert isinstance(pair.remainder, FactoredRemainder)
    remainder_left, remainder_right = pair.remainder.used
    left = torch.cat(
        [pair.scaling * pair.lora_B.detach().double(), pair.layer.remainder_scaling * remainder_left.double()], dim=1
    )
    right = torch.cat([pair.lora_A.detach().mT.double(), remainder_right.double()], dim=1)
    return factors_of_product(left, right)
