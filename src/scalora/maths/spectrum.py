"""What the singular values of an update say: its ranks and its norm (tensors only)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scalora.maths.lowrank import DEFAULT_RTOL


class UpdateFigures(NamedTuple):
    """What an update's singular values say.

    Attributes:
        numerical_rank: how many exceed `rtol` times the largest, as `scalora.numerical_rank`; 0 for a zero update.
        effective_rank: ``exp`` of the entropy of their shares, as `scalora.effective_rank`; 0 for a zero update.
        norm: the Frobenius norm.
        adapter_rank: the columns of an ordinary adapter that leaves out at most `rtol` of the Frobenius norm.
    """

    numerical_rank: int
    effective_rank: float
    norm: float
    adapter_rank: int


def update_figures(singular_values: Float[Tensor, " k"], rtol: float = DEFAULT_RTOL) -> UpdateFigures:
    """Ranks and norm of an update from its singular values, so that one decomposition is enough for all of them.

    Args:
        singular_values: descending; all of those that are not 0.
        rtol: of the numerical rank and of the adapter's error; the default is the one of `scalora.numerical_rank` and
            of `scalora.export_adapter`.
    """
    values = singular_values.double()
    left_out = values.square().flip(0).cumsum(0).flip(0)  # by an adapter with 0, 1, 2, … columns
    return UpdateFigures(
        numerical_rank=rank_of_values(values, rtol),
        effective_rank=effective_rank_of_values(values),
        norm=float(left_out[0].sqrt()),
        adapter_rank=int((left_out > rtol**2 * left_out[0]).sum()),
    )


def numerical_rank(matrix: Float[Tensor, "m n"], rtol: float = DEFAULT_RTOL) -> int:
    """How many singular values exceed ``rtol`` times the largest (computed in float64); 0 for a zero matrix.

    The default is the one that the project's figures use: float32 training noise sits near 1e-6 of the largest value,
    three orders below it.
    """
    return rank_of_values(torch.linalg.svdvals(matrix.double()), rtol)


def rank_of_values(values: Float[Tensor, " k"], rtol: float = DEFAULT_RTOL) -> int:
    """`numerical_rank` of a matrix with these singular values, in descending order."""
    return int((values > rtol * values[0]).sum())


def effective_rank(matrix: Float[Tensor, "m n"]) -> float:
    """``exp`` of the entropy of the normalised singular values (Roy and Vetterli, 2007): a rank without a threshold.

    It is what a high-rank method is judged by where no threshold is agreed on (paper, Figure 2(b)); 0 for a zero
    matrix.
    """
    return effective_rank_of_values(torch.linalg.svdvals(matrix.double()))


def effective_rank_of_values(values: Float[Tensor, " k"]) -> float:
    """`effective_rank` of a matrix with these singular values."""
    if not values.any():
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())
