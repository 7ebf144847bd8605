"""Rank and spectrum of a weight update: what a high-rank method is judged by (paper, Figure 2(b))."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def numerical_rank(matrix: Float[Tensor, "m n"], rtol: float = 1e-3) -> int:
    """How many singular values exceed ``rtol`` times the largest (computed in float64); 0 for a zero matrix.

    The default is the one that the project's figures use: float32 training noise sits near 1e-6 of the largest value,
    three orders below it.
    """
    values = torch.linalg.svdvals(matrix.double())
    return int((values > rtol * values[0]).sum())


def effective_rank(matrix: Float[Tensor, "m n"]) -> float:
    """``exp`` of the entropy of the normalised singular values (Roy and Vetterli, 2007): a rank without a threshold."""
    values = torch.linalg.svdvals(matrix.double())
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())
