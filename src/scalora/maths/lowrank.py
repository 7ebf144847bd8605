"""Low-rank factors: compressing a product, truncated SVDs of products and dense matrices (paper, section 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

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
    products: Sequence[tuple[Float[Tensor, "_m k"], Float[Tensor, "_n k"]]], *, rtol: float, max_rank: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Approximate products ``left @ right.T`` by products of fewer columns, without forming anything of size m × n.

    Computed in float64 from k × k Gram matrices and their eigenvectors, batched over all products: thin QRs and SVDs,
    layer by layer, take several times as long on a CPU. This resolves singular values down to 6e-8 of the largest,
    which is float32's own rounding; `factors_of_product` resolves smaller ones.

    Args:
        products: pairs (left, right) of shapes (m, k) and (n, k), finite; m and n may differ between pairs, k may not.
        rtol: the largest error allowed, relative to the product's Frobenius norm.
        max_rank: the largest number of columns to keep, even if the error then exceeds `rtol`.

    Returns:
        For each product, the new left and right factors in the dtypes of the old ones, balanced
        (``left.T @ left = right.T @ right``, diagonal, descending), and the squared Frobenius norm of what is left out,
        in float64.
    """
    gram_left = torch.stack([_gram(left) for left, _ in products])
    gram_right = torch.stack([_gram(right) for _, right in products])
    # With right = Q·rootᵀ, Q orthonormal, the product's singular values are those of left·root.
    spectrum, basis = torch.linalg.eigh(gram_right)
    root = basis * spectrum.clamp_min(0).sqrt()[..., None, :]
    squares, vectors = torch.linalg.eigh(root.mT @ gram_left @ root)
    squares, vectors = squares.flip(-1), vectors.flip(-1)
    squares = torch.where(squares > _ROUNDINGS * torch.finfo(squares.dtype).eps * squares[..., :1], squares, 0)
    energy = squares.sum(-1)
    ranks = [min(rank, max_rank) for rank in _ranks_for_tolerance(squares, energy, rtol).tolist()]

    top = max(ranks)
    directions, squares = root @ vectors[..., :top], squares[..., :top]
    inverse_root = torch.where(squares > 0, squares, 1).pow(-0.25)
    # uᵢ = left·directionᵢ/σᵢ, and the product's transpose maps uᵢ to σᵢ·vᵢ; each factor gets √σᵢ.
    to_left = directions * inverse_root[..., None, :]
    to_right = gram_left @ directions * inverse_root.pow(3)[..., None, :]
    return [
        (
            (left.double() @ to_left[i, :, :rank]).to(left.dtype),
            (right.double() @ to_right[i, :, :rank]).to(right.dtype),
            (energy[i] - squares[i, :rank].sum()).clamp_min(0),
        )
        for i, ((left, right), rank) in enumerate(zip(products, ranks, strict=True))
    ]


def _gram(factor: Float[Tensor, "m k"]) -> Float[Tensor, "k k"]:
    factor = factor.double()
    return factor.mT @ factor


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
    return int(_ranks_for_tolerance(factors.values.square(), factors.energy, rtol))


def _ranks_for_tolerance(
    squares: Float[Tensor, "*matrices k"], energy: Float[Tensor, "*matrices"], rtol: float
) -> Int[Tensor, "*matrices"]:
    left_out = energy[..., None] - torch.cat([torch.zeros_like(squares[..., :1]), squares.cumsum(-1)], dim=-1)
    enough = left_out <= rtol**2 * energy[..., None]
    return torch.where(enough.any(-1), enough.int().argmax(-1), squares.shape[-1])
