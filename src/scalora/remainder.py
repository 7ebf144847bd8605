"""Where the remainder of a rescale goes: ``W += s·A·diag(1 − α⊙β)·Bᵀ`` into the dense base weight."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def merge_dense(
    weight: Tensor,
    A: Float[Tensor, "m r"],
    B: Float[Tensor, "n r"],
    coefficients: Float[Tensor, " r"],
    *,
    transposed: bool,
) -> None:
    """Add ``A·diag(coefficients)·Bᵀ`` to a weight in place, without a temporary of its size in float32 and float64.

    Args:
        weight: (m, n), or (n, m) when `transposed` (Conv1D and embeddings store it so). A half-precision weight is
            updated through float32 and rounded once per merge.
        A: unscaled factor, in the adapter's dtype.
        B: unscaled factor.
        coefficients: ``s·(1 − αβ)``; columns with exactly 0 contribute exactly nothing, whatever A and B hold.
        transposed: see `weight`.
    """
    left = torch.where(coefficients == 0, 0, A * coefficients.to(A.dtype))
    right = torch.where(coefficients == 0, 0, B)
    if transposed:
        left, right = right, left
    if weight.dtype == left.dtype:
        weight.addmm_(left, right.mT)
    else:
        weight.copy_(torch.addmm(weight.to(left.dtype), left, right.mT))
