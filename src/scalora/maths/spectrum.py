"""What the singular values of an update say: its ranks and its norm (tensors only)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scalora.maths.lowrank import DEFAULT_RTOL

# Eigenvalues of a Gram matrix below this share of the largest are rounding errors. The singular values, their roots, are
# then below 6e-8 of the largest: float32's own rounding.
_GRAM_ROUNDING = 16 * torch.finfo(torch.float64).eps


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


def singular_values(matrix: Float[Tensor, "m n"]) -> Float[Tensor, " k"]:
    """All singular values of a matrix in float64, as the roots of the eigenvalues of its smaller Gram matrix.

    Several times faster than a singular value decomposition, at the price of precision: the error is about 1e-16 of the
    largest *square*, so values down to 1e-4 of the largest have eight correct digits, and those below 6e-8 of it are
    returned as 0.

    Args:
        matrix: finite. On a device without float64 (MPS), it is moved to the CPU.

    Returns:
        the values in descending order, ``min(m, n)`` of them.

    Raises:
        torch.linalg.LinAlgError: the matrix has NaN or infinite entries.
    """
    matrix = (matrix.cpu() if matrix.device.type == "mps" else matrix).double()
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.mT
    squares = torch.linalg.eigvalsh(matrix @ matrix.mT).flip(-1)
    return torch.where(squares > _GRAM_ROUNDING * squares[:1], squares, 0).sqrt()


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
