"""The whole update of a layer since the start of training: ``W_T − W_0 + s·A·Bᵀ``, dense or as factors."""

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
    """The update of a layer whose remainder is merged into its base weight, in float64.

    Args:
        pair: says how the weight is stored and what the scaling is.
        trained: the remainder, which knows what rounding has left out of the trained weight.
        weight: W_T as stored.
        base_weight: W_0 as stored.
        lora_A: PEFT's parameter.
        lora_B: PEFT's parameter.
    """
    merged = pair.oriented(trained.exact(weight).double() - base_weight.double())
    return merged + pair.scaling * lora_B.double() @ lora_A.double()


def factored_update(pair: LoraPair) -> Factors:
    """The update of a layer whose remainder is factored, ``s·A·Bᵀ`` and the remainder, by singular values.

    Args:
        pair: with a factored remainder.
    """
    assert isinstance(pair.remainder, FactoredRemainder)
    left = torch.cat([pair.scaling * pair.lora_B.detach().double(), pair.remainder.left.double()], dim=1)
    right = torch.cat([pair.lora_A.detach().mT.double(), pair.remainder.right.double()], dim=1)
    return factors_of_product(left, right)
