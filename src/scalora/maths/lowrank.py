"""Low-rank factors: compressing a product, truncated SVDs of products and dense matrices (paper, section 6)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scalora.maths.subspace import leading_subspace

DEFAULT_RTOL = 1e-3
"""The part of a matrix that is negligible: relative to its largest singular value for a numerical rank, to its
Frobenius norm for an export. Float32 training noise is near 1e-6, three orders below. At this tolerance an exported
adapter gives the loss and the generated answers of the merged model (docs/export.md)."""

# Oversampling and power iterations of the randomised range finder (Halko, Martinsson, Tropp, 2011, section 4). With
# these values its error is within a few per cent of the optimum for the slowly decaying spectra of weight updates.
_OVERSAMPLING = 10
_POWER_ITERATIONS = 4

# Eigenvalues of a Gram matrix below this many machine epsilons of the largest one are rounding errors. The singular
# values, their square roots, are then below 6e-8 of the largest, which is float32's own rounding.
_ROUNDINGS = 16

# Gram matrices with `_ROUNDINGS` more on their diagonals have a Cholesky factor, save for rare ones of very long
# columns, which have one with so many.
_MANY_ROUNDINGS = 1000

# Entries of the float64 copies that are made of factors of one shape together: 64 MiB.
_STACK = 1 << 23


class Factors(NamedTuple):
    """A truncated singular value decomposition, ``U·diag(σ)·Vᵀ``.

    Attributes:
        left: U, (m, k), with orthonormal columns.
        values: σ, (k,), in descending order.
        right: V, (n, k), with orthonormal columns.
        energy: squared Frobenius norm of the whole matrix, including what the k values leave out.
    """

    left: Float[Tensor, "m k"]
    values: Float[Tensor, " k"]
    right: Float[Tensor, "n k"]
    energy: Float[Tensor, ""]

    def truncated(self, rank: int) -> Factors:
        """Keep only the largest singular values.

        Args:
            rank: how many to keep.
        """
        return Factors(self.left[:, :rank], self.values[:rank], self.right[:, :rank], self.energy)

    def discarded(self) -> Float[Tensor, ""]:
        """Squared Frobenius norm of what the singular values leave out."""
        return (self.energy - self.values.square().sum()).clamp_min(0)


def factors_of_product(left: Float[Tensor, "m k"], right: Float[Tensor, "n k"]) -> Factors:
    """The singular value decomposition of ``left @ right.T``, from thin QRs and a k × k SVD in float64.

    Nothing of size m × n is formed.

    Args:
        left: left factor, (m, k), finite, any float dtype.
        right: right factor, (n, k), finite, any float dtype.
    """
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double())
    U, values, Vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    return Factors(q_left @ U, values, q_right @ Vh.mT, values.square().sum())


def compressed_products(
    products: Sequence[tuple[Float[Tensor, "_m k"], Float[Tensor, "_n k"]]], rank: int
) -> tuple[list[tuple[Tensor, Tensor]], Float[Tensor, " products"]]:
    """The best approximations of products ``left @ right.T`` by products of fewer columns.

    Computed in float64 from k × k Gram matrices, batched over all products, without forming anything of size m × n and
    without waiting for the device: the shapes don't depend on the values. This resolves singular values down to about
    1e-7 of the largest, which is float32's own rounding; `factors_of_product` resolves smaller ones.

    Args:
        products: pairs (left, right) of shapes (m, k) and (n, k), finite; m and n may differ between pairs, k may not.
        rank: the number of columns to keep, at most k.

    Returns:
        The new left and right factors of each product, (m, rank) and (n, rank), in the dtypes of the old ones, and for
        each product the squared Frobenius norm of what is left out, in float64. In each pair of columns both have the
        same norm. On a CPU the columns are the singular vectors, in descending order, and exactly zero from where the
        product needs no more of them.
    """
    lefts, rights = ([pair[side] for pair in products] for side in (0, 1))
    gram_left, gram_right = _grams(lefts), _grams(rights)
    balance = _balance(gram_left, gram_right)
    gram_left = balance[..., :, None] * gram_left * balance[..., None, :]
    gram_right = gram_right / balance[..., :, None] / balance[..., None, :]
    # With right = Q·rootᵀ, Q orthonormal, the product is (left·root)·Qᵀ. The best approximation is (left·root·X)·(Q·X)ᵀ
    # for the leading right singular vectors X of left·root.
    root = _cholesky(gram_right)
    of_left = root.mT @ gram_left @ root
    # The identity, but for directions in which `right` has no columns and only rounding made them up in Q.
    of_right = torch.linalg.solve_triangular(root, gram_right, upper=False)
    of_right = torch.linalg.solve_triangular(root, of_right.mT, upper=False)
    basis = leading_subspace((of_left + of_left.mT) / 2, rank)
    squares_left, squares_right = ((basis * (gram @ basis)).sum(-2, keepdim=True) for gram in (of_left, of_right))
    squares = squares_left * squares_right
    kept = squares > _ROUNDINGS * torch.finfo(squares.dtype).eps * squares.amax(-1, keepdim=True)
    basis = torch.where(kept, basis, 0)
    scale = torch.where(kept, squares_right / squares_left, 1).pow(0.25)
    to_left = balance[..., None] * (root @ (basis * scale))
    to_right = torch.linalg.solve_triangular(root.mT, basis / scale, upper=True) / balance[..., None]
    new = zip(_products(lefts, to_left), _products(rights, to_right), strict=True)

    rest = torch.eye(basis.shape[-2], dtype=basis.dtype, device=basis.device) - basis @ basis.mT
    return list(new), ((rest @ of_left @ rest) * of_right).sum((-2, -1)).clamp_min(0)


def _grams(factors: Sequence[Float[Tensor, "_rows k"]]) -> Float[Tensor, "factors k k"]:
    grams: dict[int, Tensor] = {}
    for indices, stack in _stacks(factors):
        grams |= zip(indices, stack @ stack.mT, strict=True)
    return torch.stack([grams[index] for index in range(len(factors))])


def _products(
    factors: Sequence[Float[Tensor, "_rows k"]], coefficients: Float[Tensor, "factors k columns"]
) -> list[Tensor]:
    products: dict[int, Tensor] = {}
    for indices, stack in _stacks(factors):
        of_stack = torch.stack([coefficients[index] for index in indices]).mT @ stack
        products |= zip(indices, of_stack.to(factors[0].dtype).mT, strict=True)
    return [products[index] for index in range(len(factors))]


def _stacks(factors: Sequence[Float[Tensor, "_rows k"]]) -> Iterator[tuple[list[int], Float[Tensor, "stack k rows"]]]:
    """Factors of one shape together, transposed and in float64, with their indices."""
    alike = defaultdict(list)
    for index, factor in enumerate(factors):
        alike[len(factor)].append(index)
    for indices in alike.values():
        size = max(1, _STACK // factors[indices[0]].numel())
        for start in range(0, len(indices), size):
            chunk = indices[start : start + size]
            yield chunk, torch.stack([factors[index].mT for index in chunk]).double()


def _balance(
    gram_left: Float[Tensor, "products k k"], gram_right: Float[Tensor, "products k k"]
) -> Float[Tensor, "products k"]:
    """What each left column is multiplied and each right one divided by, so that both have one norm."""
    left, right = (gram.diagonal(dim1=-2, dim2=-1) for gram in (gram_left, gram_right))
    return torch.where((left > 0) & (right > 0), right / left, 1).pow(0.25)


def _cholesky(gram: Float[Tensor, "products k k"]) -> Float[Tensor, "products k k"]:
    """The Cholesky factors of Gram matrices that may be singular."""
    norm = torch.linalg.matrix_norm(gram)[..., None, None]
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    unit = torch.where(norm > 0, norm, 1) * torch.finfo(gram.dtype).eps * identity
    factor, failed = torch.linalg.cholesky_ex(gram + _ROUNDINGS * unit)
    with_more, _ = torch.linalg.cholesky_ex(gram + _MANY_ROUNDINGS * unit)
    return torch.where(failed[..., None, None] == 0, factor, with_more)


def factors_of_dense(matrix: Float[Tensor, "m n"], rtol: float, max_rank: int) -> Factors:
    """A truncated randomised SVD of a dense matrix, of the smallest rank that meets a tolerance.

    Args:
        matrix: (m, n), finite, any float dtype; the computation is in float64.
        rtol: the largest error allowed, relative to the Frobenius norm.
        max_rank: the largest rank to return, even if the error then exceeds `rtol`; at least 1.
    """
    matrix = matrix.double()
    full, energy = min(matrix.shape), matrix.square().sum()
    guess = min(16, max_rank, full)
    while True:
        if 2 * (guess + _OVERSAMPLING) >= full:
            U, values, Vh = torch.linalg.svd(matrix, full_matrices=False)
            V = Vh.mT
        else:
            with torch.random.fork_rng():  # reproducible, and leaves the caller's random state alone
                torch.manual_seed(0)
                U, values, V = torch.svd_lowrank(matrix, q=guess + _OVERSAMPLING, niter=_POWER_ITERATIONS)
        # The trailing singular values of a randomised SVD are inexact: drop the oversampled ones.
        found = Factors(U, values, V, energy).truncated(full if len(values) == full else guess)
        rank = min(rank_for_tolerance(found, rtol), max_rank)
        if rank < len(found.values) or len(found.values) in (full, max_rank):
            return found.truncated(rank)
        guess = min(2 * guess, max_rank)


def rank_for_tolerance(factors: Factors, rtol: float) -> int:
    """The smallest rank at which a truncation leaves out at most `rtol` of the Frobenius norm; 0 for a zero matrix.

    Args:
        factors: a decomposition, truncated or not.
        rtol: the largest error allowed, relative to the Frobenius norm of the whole matrix.

    Returns:
        The rank; the number of singular values in `factors` if even all of them leave out more than `rtol`.
    """
    squares = factors.values.square()
    left_out = factors.energy - torch.cat([squares.new_zeros(1), squares.cumsum(0)])
    enough = left_out <= rtol**2 * factors.energy
    return int(torch.where(enough.any(), enough.int().argmax(), len(squares)))
