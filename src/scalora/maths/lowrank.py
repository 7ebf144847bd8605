"""Low-rank matrices as factors: compressing a product, the best factors of a dense matrix (tensors only)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

DEFAULT_RTOL = 1e-3
"""The share of a matrix that counts as nothing: of its largest singular value for a rank, of its Frobenius norm for an
export. Float32 training noise lies near 1e-6, three orders below; and at a thousandth the loss and the generated
answers of the measured runs are those of the merged model (docs/export.md)."""

# Oversampling and power iterations of the randomised range finder (Halko, Martinsson, Tropp, 2011, section 4): with
# these its error is within a few per cent of the best for the slowly decaying spectra of weight updates.
_OVERSAMPLING = 10
_POWER_ITERATIONS = 4

# Eigenvalues of a Gram matrix below this many roundings of the largest are rounding errors: singular values below 6e-8
# of the largest, which is float32's own rounding.
_ROUNDINGS = 16


class Factors(NamedTuple):
    """``left @ right.T`` by its singular values.

    Attributes:
        left: U, (m, k), orthonormal columns.
        values: σ, (k,), descending.
        right: V, (n, k), orthonormal columns.
        energy: squared Frobenius norm of the whole matrix, of which the k values may be only a part.
    """

    left: Float[Tensor, "m k"]
    values: Float[Tensor, " k"]
    right: Float[Tensor, "n k"]
    energy: Float[Tensor, ""]

    def truncated(self, rank: int) -> Factors:
        """Only the `rank` largest values."""
        return Factors(self.left[:, :rank], self.values[:rank], self.right[:, :rank], self.energy)

    def discarded(self) -> Float[Tensor, ""]:
        """Squared Frobenius norm of what the values leave out."""
        return (self.energy - self.values.square().sum()).clamp_min(0)


def factors_of_product(left: Float[Tensor, "m k"], right: Float[Tensor, "n k"]) -> Factors:
    """Singular values of ``left @ right.T`` from thin QRs and a k × k SVD, in float64: never m × n.

    Args:
        left: finite, any float dtype.
        right: likewise.
    """
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double())
    U, values, Vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    return Factors(q_left @ U, values, q_right @ Vh.mT, values.square().sum())


def compressed_products(
    products: Sequence[tuple[Float[Tensor, "_m k"], Float[Tensor, "_n k"]]], *, rtol: float, max_rank: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Products ``left @ right.T`` with fewer columns, all that have k of them together; never m × n.

    From k × k Grams in float64 and the eigenvectors of these, which a batch of them shares one operation for: thin QRs
    and SVDs, layer by layer, take several times as long on a CPU. That resolves singular values down to 6e-8 of the
    largest, float32's own rounding; for smaller ones there is `factors_of_product`.

    Args:
        products: of any m and n, and one k; finite.
        rtol: what is left out may have this share of the Frobenius norm, if `max_rank` allows.
        max_rank: most columns to keep.

    Returns:
        for each product the new left and right in its dtype, balanced (``left.T @ left = right.T @ right``, diagonal,
        descending), and the squared Frobenius norm of what is left out, in float64.
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
    # uᵢ = left·directionᵢ/σᵢ, and the product's transpose maps it to σᵢ·vᵢ; each takes √σᵢ.
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
    """The leading singular values of a dense matrix by randomised SVD, as many as `rtol` needs and `max_rank` allows.

    Args:
        matrix: finite; computed in float64.
        rtol: the part left out may have at most this share of the Frobenius norm.
        max_rank: at least 1.
    """
    matrix = matrix.double()
    full, energy = min(matrix.shape), matrix.square().sum()
    guess = min(16, max_rank, full)
    while True:
        if 2 * (guess + _OVERSAMPLING) >= full:
            U, values, Vh = torch.linalg.svd(matrix, full_matrices=False)
            V = Vh.mT
        else:
            with torch.random.fork_rng():  # the same result each time, and the caller's random numbers untouched
                torch.manual_seed(0)
                U, values, V = torch.svd_lowrank(matrix, q=guess + _OVERSAMPLING, niter=_POWER_ITERATIONS)
        # The last values of a randomised SVD are the inexact ones, so they are not used.
        found = Factors(U, values, V, energy).truncated(full if len(values) == full else guess)
        rank = min(rank_for_tolerance(found, rtol), max_rank)
        if rank < len(found.values) or len(found.values) in (full, max_rank):
            return found.truncated(rank)
        guess = min(2 * guess, max_rank)


def rank_for_tolerance(factors: Factors, rtol: float) -> int:
    """The least rank whose truncation leaves out at most `rtol` of the Frobenius norm; 0 for a zero matrix.

    All of the values when even they leave out more.
    """
    return int(_ranks_for_tolerance(factors.values.square(), factors.energy, rtol))


def _ranks_for_tolerance(
    squares: Float[Tensor, "*matrices k"], energy: Float[Tensor, "*matrices"], rtol: float
) -> Int[Tensor, "*matrices"]:
    left_out = energy[..., None] - torch.cat([torch.zeros_like(squares[..., :1]), squares.cumsum(-1)], dim=-1)
    enough = left_out <= rtol**2 * energy[..., None]
    return torch.where(enough.any(-1), enough.int().argmax(-1), squares.shape[-1])
