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
    lora_A: Float[Tensor, "rows ..."],
    lora_B: Float[Tensor, "m columns ..."],
    expert: int = 0,
) -> Float[Tensor, "m n"]:
    """The update of a layer with a dense remainder, or of one of its experts, in float64.

    Args:
        pair: the layer; only its scaling, its number of experts and the storage order of its weight are used.
        trained: the layer's remainder, with the rounding errors of the trained weight.
        weight: the trained weight W_T, as stored.
        base_weight: the original weight W_0, as stored.
        lora_A: PEFT's ``lora_A.weight``.
        lora_B: PEFT's ``lora_B.weight``.
        expert: which expert, if the layer is a stack of them.
    """
    before, matrices = pair.matrices_of_weight(base_weight)[expert], pair.matrices_of_weight(weight)
    after = trained.by_matrix(weight, matrices)[expert].exact(matrices[expert])
    merged = pair.oriented(after.double() - before.double())
    A, Bt = pair.matrices_of_B(lora_B)[expert], pair.matrices_of_A(lora_A)[expert]
    return merged + pair.scaling * A.double() @ Bt.double()


def factored_update(pair: LoraPair, expert: int = 0) -> Factors:
    """The update of a layer with a factored remainder, ``s·A·Bᵀ`` plus the remainder, as an SVD in float64.

    Args:
        pair: the layer, with a factored remainder.
        expert: which expert, if the layer is a stack of them.
    """
    assert isinstance(pair.remainder, FactoredRemainder)
    remainder_left, remainder_right = pair.remainder.products[expert]
    A = pair.matrices_of_B(pair.lora_B.detach())[expert].double()
    Bt = pair.matrices_of_A(pair.lora_A.detach())[expert].double()
    left = torch.cat([pair.scaling * A, pair.layer.remainder_scaling * remainder_left.double()], dim=1)
    return factors_of_product(left, torch.cat([Bt.mT, remainder_right.double()], dim=1))
