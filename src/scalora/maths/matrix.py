"""Matrix scaling: the best r × r change of a LoRA adapter's factors, of which column scaling is the diagonal case.

Beyond the paper; the notation is that of `scalora.maths.scaling`. With ``Ã = A·P`` and ``B̃ = B·Q`` for any invertible
r × r matrices P and Q, one gradient step moves W by ``−η(G B̃B̃ᵀ + ÃÃᵀ G)``. Let U_A and U_B be the orthonormal polar
factors of A and B (``A = U_A·R_A`` with ``R_A = (AᵀA)^(1/2)``), and

    K = U_Aᵀ G (r × n),  N = G U_B (m × r),  C = U_Aᵀ G U_B (r × r),
    X = Lη·R_A PPᵀ R_A,  Y = Lη·R_B QQᵀ R_B.

The loss bound of an L-smooth loss, ``‖G − U_A X K − N Y U_Bᵀ‖²``, depends on P and Q through X and Y alone. Its minimum
over symmetric X and Y solves the linear system

    ½(KKᵀ X + X KKᵀ) + C Y Cᵀ = KKᵀ,    ½(NᵀN Y + Y NᵀN) + Cᵀ X C = NᵀN.

It depends on LoRA's own gradients only, through the inner products of `scalora.maths.scaling.Grams`. With C = 0 its
solution is ``X = Y = 1``: orthonormal factors of norm ``1/√(Lη)``. ``"polar"`` takes these, whatever C is. They need no
gradient and no solve, and their residual is near the optimum's unless most of what the factors see of G is in the span
of both (docs/method.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from scalora.maths.mode import LEFT_ALONE, MATRIX, Optimum
from scalora.maths.roots import inverse_root_on_range
from scalora.maths.scaling import FACTOR_RANGE, Grams, grams, solver_dtype

# Directions of a factor whose singular value is below 1e-3 of the root mean square are scaled as the typical one is;
# any invertible change keeps the function. Where a factor can have no extent, as with more columns than rows,
# lengthening what rounding left there would do so anew at every rescale, and the other factor's moments would grow
# without limit. And where a direction has just come up, the moments are of steps before it did: lengthened 1e5 times
# at once, they made SGD with momentum diverge.
_THRESHOLD = 1e-6

# The smallest eigenvalue of X and Y: the system's solution may be slightly negative, and a direction that is scaled to
# zero would get no gradient again.
_SMALLEST_EIGENVALUE = 1e-3

# How much a distance from X = Y = 1 costs, in units of ‖K‖² + ‖N‖². Where G hardly tells one solution from another (as
# when its rows and columns are in the span of A and B), it keeps the eigenvalues between 0 and 1: without it they reach
# ±500 there. It costs 1e-10 of the bound.
_RIDGE = 1e-10

# Conjugate gradients end when a step would lower the bound by less than about 1e-22 of ‖K‖² + ‖N‖². That takes 10 to 60
# steps for the r(r + 1) unknowns; where G is in the span of A and B it takes more, and a layer of rank 32 is at 1e-8 of
# ‖G‖² after 200.
_CG_TOLERANCE = 1e-22
_CG_STEPS = 200


class MatrixScaling(NamedTuple):
    """The matrices for each layer at one step.

    Attributes:
        P: right factor of A, (…, r, r), invertible; exactly 1 for a layer that is left alone.
        Q: right factor of B, (…, r, r), invertible; exactly 1 for a layer that is left alone.
        choice: `MATRIX` or `LEFT_ALONE` for each layer, (…).
        degenerate: whether a layer was left alone because a factor is zero or an input is not finite, (…).
        nonfinite: whether a layer was left alone because of NaN or infinite entries, (…).
        exploding: whether a layer was left alone because a factor is too far from the target norm, (…).
    """

    P: Float[Tensor, "*layers r r"]
    Q: Float[Tensor, "*layers r r"]
    choice: Int[Tensor, "*layers"]
    degenerate: Bool[Tensor, "*layers"]
    nonfinite: Bool[Tensor, "*layers"]
    exploding: Bool[Tensor, "*layers"]

    def unless(self, skipped: Bool[Tensor, ""]) -> MatrixScaling:
        """Leave every layer alone if the optimizer skips its step. Does not wait for the device.

        Args:
            skipped: whether the step is skipped; a scalar on the device of the matrices.

        Returns:
            This scaling, or one with all matrices 1 if `skipped`.
        """
        identity = torch.eye(self.P.shape[-1], dtype=self.P.dtype, device=self.P.device)
        return MatrixScaling(
            torch.where(skipped, identity, self.P),
            torch.where(skipped, identity, self.Q),
            torch.where(skipped, LEFT_ALONE, self.choice),
            degenerate=self.degenerate & ~skipped,
            nonfinite=self.nonfinite & ~skipped,
            exploding=self.exploding & ~skipped,
        )


def polar_scaling(
    A: Float[Tensor, "*layers m r"], B: Float[Tensor, "*layers n r"]
) -> tuple[Float[Tensor, "*layers r r"], Float[Tensor, "*layers r r"]]:
    """The change that makes both factors orthonormal, as ``Lη·PPᵀ = (AᵀA)⁻¹`` and ``Lη·QQᵀ = (BᵀB)⁻¹``.

    Args:
        A: PEFT's ``lora_B.weight``, (…, m, r), any float dtype.
        B: PEFT's ``lora_A.weight`` transposed, (…, n, r), any float dtype.

    Returns:
        ``Lη·PPᵀ`` and ``Lη·QQᵀ``, (…, r, r), in float64 (float32 on devices without it). Directions in which a factor
        has no extent are scaled as the typical one; a zero or non-finite factor gets zeros.
    """
    dtype = solver_dtype(A.device)
    to_A, to_B = (inverse_root_on_range(f.to(dtype).mT @ f.to(dtype), threshold=0.0).root for f in (A, B))
    return to_A @ to_A, to_B @ to_B


def matrix_scaling(
    A: Float[Tensor, "*layers m r"],
    B: Float[Tensor, "*layers n r"],
    GB: Float[Tensor, "*layers m r"],
    GtA: Float[Tensor, "*layers n r"],
) -> tuple[Float[Tensor, "*layers r r"], Float[Tensor, "*layers r r"]]:
    """The optimum over all r × r changes of both factors, as ``Lη·PPᵀ`` and ``Lη·QQᵀ``.

    Args:
        A: PEFT's ``lora_B.weight``, (…, m, r), any float dtype.
        B: PEFT's ``lora_A.weight`` transposed, (…, n, r), any float dtype.
        GB: ``G·B``, (…, m, r). Any common positive factor of GB and GtA is allowed: the result does not depend on it.
        GtA: ``Gᵀ·A``, (…, n, r), up to the same factor.

    Returns:
        ``Lη·PPᵀ`` and ``Lη·QQᵀ``, (…, r, r), in float64 (float32 on devices without it), the minimum over symmetric
        matrices. Where both are positive semi-definite, as they practically always are, it is the optimum. A layer
        without one (a zero factor, NaN or infinite entries) gets zeros.

    Raises:
        ValueError: the four shapes don't match.
    """
    inner = grams(A, B, GB, GtA)
    roots = _polar_roots(inner, threshold=0.0)
    X, Y = _solve(inner, roots)
    usable = roots.usable[..., None, None]
    return torch.where(usable, roots.A @ X @ roots.A, 0), torch.where(usable, roots.B @ Y @ roots.B, 0)


def matrix_scaling_of_grams(
    grams: Grams, *, target_norm: float | Float[Tensor, "*layers 2"], optimum: Optimum = "polar"
) -> MatrixScaling:
    """The matrices to use for layers whose inner products are known.

    Args:
        grams: the inner products of the layers.
        target_norm: ``1/√(Lη)``, the norm of the orthonormal columns. One number for all, or (…, 2) with one for A and
            one for B.
        optimum: ``"polar"`` makes both factors orthonormal; ``"exact"`` minimises the loss bound, which waits for the
            device.

    Returns:
        The matrices. A layer with a zero factor or non-finite entries is left alone, with matrices of exactly 1.
    """
    roots = _polar_roots(grams, _THRESHOLD)
    P, Q = roots.A, roots.B
    if optimum == "exact":
        X, Y = _solve(grams, roots)
        P, Q = P @ _root(X), Q @ _root(Y)
    norms = torch.as_tensor(target_norm, dtype=P.dtype, device=P.device).expand(*P.shape[:-2], 2)
    low, high = FACTOR_RANGE
    typical = norms / torch.stack([_rms_of_columns(gram) for gram in grams.of_factors], -1)
    in_range = ((typical > low) & (typical < high)).all(-1)
    chosen = roots.usable & in_range
    identity = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
    P = torch.where(chosen[..., None, None], P * norms[..., :1, None], identity)
    Q = torch.where(chosen[..., None, None], Q * norms[..., 1:, None], identity)
    return MatrixScaling(
        P,
        Q,
        MATRIX * chosen.int(),
        degenerate=~roots.usable,
        nonfinite=~roots.finite,
        exploding=roots.usable & ~in_range,
    )


class _PolarRoots(NamedTuple):
    """``(AᵀA)^(−1/2)`` and ``(BᵀB)^(−1/2)``; whether both exist, and whether all inner products are finite."""

    A: Float[Tensor, "*layers r r"]
    B: Float[Tensor, "*layers r r"]
    usable: Bool[Tensor, "*layers"]
    finite: Bool[Tensor, "*layers"]


def _polar_roots(grams: Grams, threshold: float) -> _PolarRoots:
    finite = (grams.left.isfinite() & grams.right.isfinite()).all(-1).all(-1)
    roots, usable = inverse_root_on_range(torch.stack(grams.of_factors), threshold=threshold)
    return _PolarRoots(roots[0], roots[1], finite & usable.all(0), finite)


def _solve(grams: Grams, roots: _PolarRoots) -> tuple[Float[Tensor, "*layers r r"], Float[Tensor, "*layers r r"]]:
    """X and Y. Where they are not unique, those nearest to 1.

    Conjugate gradients on ``1 − X`` and ``1 − Y``, for which the right-hand sides are ``CCᵀ`` and ``CᵀC``. In the
    eigenbases of KKᵀ and NᵀN, their terms of the system are products entry by entry, which serve as preconditioner.
    """
    r = roots.A.shape[-1]
    usable = roots.usable[..., None, None]
    identity = torch.eye(r, dtype=roots.A.dtype, device=roots.A.device)
    KKt = torch.where(usable, roots.A @ grams.right[..., :r, :r] @ roots.A, identity)
    NtN = torch.where(usable, roots.B @ grams.left[..., r:, r:] @ roots.B, identity)
    C = torch.where(usable, roots.A @ grams.left[..., :r, r:] @ roots.B, 0)
    # The solution does not depend on the scale of the gradient.
    scale = (KKt + NtN).diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(torch.finfo(C.dtype).tiny)
    (k, E), (n, F) = torch.linalg.eigh(KKt / scale), torch.linalg.eigh(NtN / scale)
    C = E.mT @ (C / scale.sqrt()) @ F
    k, n = k.clamp_min(0), n.clamp_min(0)
    diagonal = torch.stack([(k[..., :, None] + k[..., None, :]) / 2, (n[..., :, None] + n[..., None, :]) / 2]) + _RIDGE

    residual = torch.stack([C @ C.mT, C.mT @ C])
    solution = torch.zeros_like(residual)
    preconditioned = direction = residual / diagonal
    energy = _inner(residual, preconditioned)
    for _ in range(_CG_STEPS):
        ended = energy <= _CG_TOLERANCE
        if ended.all():
            break
        image = diagonal * direction + torch.stack([C @ direction[1] @ C.mT, C.mT @ direction[0] @ C])
        length = torch.where(ended, 0, energy / _inner(direction, image))
        solution = solution + length * direction
        residual = residual - length * image
        preconditioned = residual / diagonal
        before, energy = energy, _inner(residual, preconditioned)
        direction = torch.where(ended, direction, preconditioned + energy / before * direction)
    X, Y = identity - E @ solution[0] @ E.mT, identity - F @ solution[1] @ F.mT
    return (X + X.mT) / 2, (Y + Y.mT) / 2


def _inner(first: Tensor, second: Tensor) -> Tensor:
    """Inner products over both unknowns of each layer, with dimensions of one to broadcast."""
    return (first * second).sum((0, -2, -1), keepdim=True)


def _root(matrix: Float[Tensor, "*layers r r"]) -> Float[Tensor, "*layers r r"]:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp_min(_SMALLEST_EIGENVALUE).sqrt()[..., None, :]) @ vectors.mT
    return root


def _rms_of_columns(gram: Float[Tensor, "*layers r r"]) -> Float[Tensor, "*layers"]:
    rms: Tensor = gram.diagonal(dim1=-2, dim2=-1).mean(-1).sqrt()
    return rms
