"""Ranks and norm of an update from its singular values, as in the paper's analysis of ranks (Figure 2(b))."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scalora.maths.lowrank import DEFAULT_RTOL

# Eigenvalues of a Gram matrix below this share of the largest one are rounding errors. The singular values, their
# square roots, are then below 6e-8 of the largest, which is float32's own rounding.
_GRAM_ROUNDING = 16 * torch.finfo(torch.float64).eps


class UpdateFigures(NamedTuple):
    """Ranks and norm of an update.

    Attributes:
        numerical_rank: number of singular values above `rtol` times the largest; 0 for a zero update.
        effective_rank: ``exp`` of the entropy of the normalised singular values; 0 for a zero update.
        norm: Frobenius norm.
        adapter_rank: rank of the smallest ordinary adapter that leaves out at most `rtol` of the Frobenius norm.
    """

    numerical_rank: int
    effective_rank: float
    norm: float
    adapter_rank: int


def update_figures(singular_values: Float[Tensor, " k"], rtol: float = DEFAULT_RTOL) -> UpdateFigures:
    """Ranks and norm of an update from one decomposition.

    Args:
        singular_values: all non-zero singular values of the update, in descending order.
        rtol: tolerance of the numerical rank, relative to the largest singular value, and of the adapter's error,
            relative to the Frobenius norm.
    """
    values = singular_values.double()
    left_out = values.square().flip(0).cumsum(0).flip(0)  # by adapters of rank 0, 1, 2, …
    return UpdateFigures(
        numerical_rank=rank_of_values(values, rtol),
        effective_rank=effective_rank_of_values(values),
        norm=float(left_out[0].sqrt()),
        adapter_rank=int((left_out > rtol**2 * left_out[0]).sum()),
    )


def singular_values(matrix: Float[Tensor, "m n"]) -> Float[Tensor, " k"]:
    """All singular values of a matrix in float64, as square roots of the eigenvalues of its smaller Gram matrix.

    Several times faster than a singular value decomposition and less precise: the error is about 1e-16 of the largest
    *square*. Values down to 1e-4 of the largest have eight correct digits; values below 6e-8 of it are returned as 0.

    Args:
        matrix: (m, n), finite, any float dtype. On a device without float64 (MPS), it is moved to the CPU.

    Returns:
        The ``min(m, n)`` singular values in descending order.

    Raises:
        torch.linalg.LinAlgError: the matrix has NaN or infinite entries.
    """
    matrix = (matrix.cpu() if matrix.device.type == "mps" else matrix).double()
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.mT
    squares = torch.linalg.eigvalsh(matrix @ matrix.mT).flip(-1)
    return torch.where(squares > _GRAM_ROUNDING * squares[:1], squares, 0).sqrt()


def numerical_rank(matrix: Float[Tensor, "m n"], rtol: float = DEFAULT_RTOL) -> int:
    """The number of singular values above ``rtol`` times the largest; 0 for a zero matrix.

    Args:
        matrix: (m, n), finite, any float dtype; the computation is in float64.
        rtol: threshold relative to the largest singular value. Float32 training noise is near 1e-6 of the largest
            value, three orders below the default.

    Returns:
        The rank.
    """
    return rank_of_values(torch.linalg.svdvals(matrix.double()), rtol)


def rank_of_values(values: Float[Tensor, " k"], rtol: float = DEFAULT_RTOL) -> int:
    """The number of singular values above ``rtol`` times the largest; 0 if all are zero.

    Args:
        values: singular values in descending order, at least one.
        rtol: threshold relative to the largest singular value.
    """
    return int((values > rtol * values[0]).sum())


def effective_rank(matrix: Float[Tensor, "m n"]) -> float:
    """``exp`` of the entropy of the normalised singular values (Roy and Vetterli, 2007): a rank without a threshold.

    A measure of high-rank updates where no threshold is agreed on (paper, Figure 2(b)); 0 for a zero matrix.

    Args:
        matrix: (m, n), finite, any float dtype; the computation is in float64.

    Returns:
        The rank, between 1 and the smaller of m and n unless the matrix is zero.
    """
    return effective_rank_of_values(torch.linalg.svdvals(matrix.double()))


def effective_rank_of_values(values: Float[Tensor, " k"]) -> float:
    """``exp`` of the entropy of the normalised singular values; 0 if all are zero.

    Args:
        values: singular values, not negative, in any order.
    """
    if not values.any():
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())
