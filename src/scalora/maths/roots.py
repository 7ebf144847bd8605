"""Inverse square roots of small symmetric matrices, batched and without waiting for the device: tensors only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Newton's iteration with its scaling converges in seven steps at condition numbers up to 1e14.
_NEWTON_STEPS = 8

# Damping that is never fallen below, in roundings of the dtype times r: with it, even the Gram matrix of 8192 copies of
# one row has a Cholesky factor. With a quarter of it, one in a hundred of such matrices has none.
_LEAST_ROUNDINGS = 32

# Steps of McWeeny's purification, which takes shares to 0 or 1. An eigenvalue that is ten times the threshold has a
# share of 0.91 at first, and of 1 up to rounding in the end.
_PURIFICATIONS = 6


class InverseRoot(NamedTuple):
    """Inverse square roots of matrices.

    Attributes:
        root: ``(M + damping)^(−1/2)``, (…, r, r), symmetric; zero where there is none.
        usable: whether there is one: M is finite, not zero, and positive semi-definite up to rounding, (…).
    """

    root: Float[Tensor, "*layers r r"]
    usable: Bool[Tensor, "*layers"]


def inverse_root(
    matrix: Float[Tensor, "*layers r r"],
    *,
    relative_damping: float,
    absolute_damping: float = 0.0,
) -> InverseRoot:
    """The symmetric inverse square root of ``M + (relative_damping·tr(M)/r + absolute_damping)·1``.

    Args:
        matrix: M, (…, r, r), symmetric positive semi-definite up to rounding, in the solver's dtype.
        relative_damping: in units of M's mean eigenvalue. Rounding errors of M are damped even if it is 0.
        absolute_damping: added whatever the size of M.

    Returns:
        The roots, in M's dtype. Zero for a matrix that has none: one that is zero or has NaN or infinite entries.
    """
    r = matrix.shape[-1]
    mean = matrix.diagonal(dim1=-2, dim2=-1).sum(-1) / r
    usable = matrix.isfinite().all(-1).all(-1) & (mean > 0)
    identity = torch.eye(r, dtype=matrix.dtype, device=matrix.device)
    # To a mean eigenvalue of 1, so that neither squares nor roots leave the range of the dtype.
    mean = torch.where(usable, mean, 1.0)[..., None, None]
    damped = torch.where(usable[..., None, None], matrix / mean, identity)
    damped = damped + (max(relative_damping, least_damping(matrix)) + absolute_damping / mean) * identity
    # `eigh` on a GPU makes the host wait for the device; on a CPU it is several times faster.
    root = (_by_eigenvalues(damped) if matrix.is_cpu else by_newton(damped)) * mean.rsqrt()
    usable = usable & root.isfinite().all(-1).all(-1)
    return InverseRoot(torch.where(usable[..., None, None], root, 0), usable)


def inverse_root_on_range(matrix: Float[Tensor, "*layers r r"], *, threshold: float) -> InverseRoot:
    """The symmetric inverse square root of M where M has an extent, and a multiple of 1 where it has none.

    That is ``(S·M·S + μ·(1 − S))^(−1/2)``, where S projects onto the eigenvectors with an eigenvalue above the
    threshold, and μ is the mean of these eigenvalues: the other directions are changed as the typical one is.

    Args:
        matrix: M, (…, r, r), symmetric positive semi-definite up to rounding, in the solver's dtype.
        threshold: in units of M's mean eigenvalue. Rounding errors of M are no extent even if it is 0.

    Returns:
        The roots, in M's dtype. Zero for a matrix that has none: one that is zero or has NaN or infinite entries.
    """
    r = matrix.shape[-1]
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    usable = matrix.isfinite().all(-1).all(-1) & (trace > 0)
    identity = torch.eye(r, dtype=matrix.dtype, device=matrix.device)
    of_usable = torch.where(usable[..., None, None], matrix, identity)
    trace = torch.where(usable, trace, r)[..., None, None]
    middle = max(threshold, least_damping(matrix)) * trace / r
    share = of_usable @ torch.linalg.inv_ex(of_usable + middle * identity).inverse
    for _ in range(_PURIFICATIONS):
        square = share @ share
        share = 3 * square - 2 * square @ share
    share = (share + share.mT) / 2
    extents = share.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(1.0)
    filled = share @ of_usable @ share + trace / extents * (identity - share)
    root, has_root = inverse_root((filled + filled.mT) / 2, relative_damping=0.0)
    return InverseRoot(torch.where(usable[..., None, None], root, 0), usable & has_root)


def least_damping(matrix: Float[Tensor, "*layers r r"]) -> float:
    """The damping, in units of the mean eigenvalue, with which a Gram matrix has a Cholesky factor despite rounding.

    Args:
        matrix: (…, r, r), computed in its dtype.
    """
    return _LEAST_ROUNDINGS * matrix.shape[-1] * torch.finfo(matrix.dtype).eps


def _by_eigenvalues(matrix: Float[Tensor, "*layers r r"]) -> Float[Tensor, "*layers r r"]:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.rsqrt()[..., None, :]) @ vectors.mT
    return root


def by_newton(matrix: Float[Tensor, "*layers r r"]) -> Float[Tensor, "*layers r r"]:
    """The inverse square root of positive definite matrices by matrix products and inverses alone.

    With the Cholesky factor L and its polar decomposition ``L = M^(1/2)·W``, the root is ``L^(−T)·Wᵀ``. W is the limit
    of Newton's iteration ``X ← (γX + X^(−T)/γ)/2`` (Higham, "Functions of Matrices", section 8.6, with its scaling γ).

    Args:
        matrix: (…, r, r), symmetric positive definite, with eigenvalues around 1.

    Returns:
        ``M^(−1/2)``, (…, r, r).
    """
    factor, _ = torch.linalg.cholesky_ex(matrix)
    X = factor
    for _ in range(_NEWTON_STEPS):
        inverse = torch.linalg.inv_ex(X).inverse.mT
        scale = (_norm(inverse) / _norm(X)).sqrt()
        X = (scale * X + inverse / scale) / 2
    root: Tensor = torch.linalg.solve_triangular(factor.mT, X.mT, upper=True)
    return (root + root.mT) / 2


def _norm(matrix: Float[Tensor, "*layers r r"]) -> Float[Tensor, "*layers 1 1"]:
    norm: Tensor = torch.linalg.matrix_norm(matrix, keepdim=True)
    return norm
