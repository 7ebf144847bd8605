"""Leading eigenspaces of small symmetric matrices, batched and without waiting for the device: tensors only."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# A small eigenvalue grows at most by a factor of 2 in each step of the purification: 47 bring one that is 1e-14 of the
# largest, float64's rounding, to 1, and 17 more tell it from a neighbour that is a hundredth smaller.
_STEPS = 64

# A trace this close to the rank is right.
_SETTLED = 0.01

# `P^(2^24)` keeps nothing of eigenvalues that were kept in part: k equal ones are up to (1/k)² below 1 at the end.
_SQUARINGS = 24

# Passes over the basis. Each suppresses directions that are kept only in part by the factor `_IN_PART` or more against
# those that are kept whole: after four, by more than the largest ratio of eigenvalues that float64 can tell apart.
_PASSES = 4
_IN_PART = 1e-3


def leading_subspace(matrix: Float[Tensor, "*layers k k"], rank: int) -> Float[Tensor, "*layers k rank"]:
    """An orthonormal basis of the eigenvectors of the largest eigenvalues of each matrix.

    Args:
        matrix: (…, k, k), symmetric, positive semi-definite up to rounding, finite, in float64.
        rank: how many eigenvectors, at most k. Among equal eigenvalues at this border, any may be chosen.

    Returns:
        (…, k, rank): on a CPU the eigenvectors themselves, those of the largest eigenvalues first; on other devices
        some other basis of their span.
    """
    # `eigh` on a GPU makes the host wait for the device; on a CPU it is several times faster.
    if matrix.is_cpu:
        vectors: Tensor = torch.linalg.eigh(matrix).eigenvectors
        return vectors[..., -rank:].flip(-1)
    return by_purification(matrix, rank)


def by_purification(matrix: Float[Tensor, "*layers k k"], rank: int) -> Float[Tensor, "*layers k rank"]:
    """`leading_subspace` by matrix products and Cholesky factors alone: their number does not depend on the values.

    The projector P onto the subspace is the limit of ``X ← X²`` and ``X ← 2X − X²``, which push the eigenvalues of X
    from between 0 and 1 to the one or the other: the first makes the trace smaller, the second larger, and each step
    takes that which brings it nearer to `rank` ("second-order spectral projection": Niklasson, Phys. Rev. B 66, 155115,
    2002).

    Of equal eigenvalues at the border, P keeps all in part. The basis must contain all eigenvectors that P keeps whole,
    which is what a high power of P does, and may be filled up with any of the others.

    Args:
        matrix: as in `leading_subspace`.
        rank: as in `leading_subspace`.
    """
    k, limits = matrix.shape[-1], torch.finfo(matrix.dtype)
    norm = torch.linalg.matrix_norm(matrix)[..., None, None].clamp_min(limits.tiny)
    # Rounding errors must not make an eigenvalue negative: it would grow without limit.
    shift = k * limits.eps
    X = (matrix / norm + shift * torch.eye(k, dtype=matrix.dtype, device=matrix.device)) / (1 + shift)
    one = torch.ones((), dtype=matrix.dtype, device=matrix.device)
    for step in range(_STEPS):
        # X² where the trace is too large, else 2X − X²; in turn where it is right, since either alone would let
        # rounding errors grow: the first those of ones, the second those of zeros.
        turn = _SETTLED if step % 2 else -_SETTLED
        sign = torch.copysign(one, X.diagonal(dim1=-2, dim2=-1).sum(-1) - (rank + turn))
        X = torch.lerp(X, X @ X, sign[..., None, None])
        X = (X + X.mT) / 2
    whole = X
    for _ in range(_SQUARINGS):
        whole = whole @ whole
    basis = _orthonormal(X @ _generic(k, rank, matrix))
    for _ in range(_PASSES):
        basis = _orthonormal((whole + _IN_PART * X) @ basis)
    return _orthonormal(basis)


def _generic(rows: int, columns: int, like: Tensor) -> Float[Tensor, "rows columns"]:
    """Fixed numbers between −1/2 and 1/2 without a pattern. Random ones on the host would have to be copied."""
    row, column = (torch.arange(size, dtype=like.dtype, device=like.device) for size in (rows, columns))
    return torch.frac(1e4 * torch.sin(1 + 12.9898 * row[:, None] + 78.233 * column)) / 2


def _orthonormal(basis: Float[Tensor, "*layers k rank"]) -> Float[Tensor, "*layers k rank"]:
    factor, _ = torch.linalg.cholesky_ex(basis.mT @ basis)
    transposed: Tensor = torch.linalg.solve_triangular(factor, basis.mT, upper=False)
    return transposed.mT
