"""The whole update of a layer since the start of training, ``W_T − W_0 + s·A·Bᵀ`` (paper, section 6)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from scalora.maths.lowrank import Factors, factors_of_product
from scalora.model.adapters import LoraPair
from scalora.rescale.remainder import DenseRemainder, FactoredRemainder


def dense_updates(
    pair: LoraPair,
    trained: DenseRemainder,
    weight: Tensor,
    base_weight: Tensor,
    lora_A: Float[Tensor, "rows n"],
    lora_B: Float[Tensor, "m columns"],
) -> Iterator[Float[Tensor, "m n"]]:
    """The update of a layer with a dense remainder, in float64: of each of its experts, if it is a stack of them.

    Args:
        pair: the layer; only its scaling, its experts and the storage order of its weight are used.
        trained: the layer's remainder, with the rounding errors of the trained weight.
        weight: the trained weight W_T, as stored.
        base_weight: the original weight W_0, as stored.
        lora_A: PEFT's ``lora_A.weight``.
        lora_B: PEFT's ``lora_B.weight``.
    """
    experts = [trained] if pair.experts == 1 else trained.by_expert(weight)
    stacks = ([weight], [base_weight]) if pair.experts == 1 else (weight, base_weight)
    factors = pair.matrices_of_B(lora_B), pair.matrices_of_A(lora_A)
    for remainder, after, before, A, Bt in zip(experts, *stacks, *factors, strict=True):
        merged = pair.oriented(remainder.exact(after).double() - before.double())
        yield merged + pair.scaling * A.double() @ Bt.double()


def factored_updates(pair: LoraPair) -> list[Factors]:
    """The update of a layer with a factored remainder, ``s·A·Bᵀ`` plus the remainder, as an SVD in float64.

    Args:
        pair: the layer, with a factored remainder.

    Returns:
        The SVD; of each of its experts, if the layer is a stack of them.
    """
    assert isinstance(pair.remainder, FactoredRemainder)
    factors = pair.matrices_of_B(pair.lora_B.detach()), pair.matrices_of_A(pair.lora_A.detach())
    found = []
    for A, Bt, (remainder_left, remainder_right) in zip(*factors, pair.remainder.products, strict=True):
        left = torch.cat([pair.scaling * A.double(), pair.layer.remainder_scaling * remainder_left.double()], dim=1)
        right = torch.cat([Bt.mT.double(), remainder_right.double()], dim=1)
        found.append(factors_of_product(left, right))
    return found
