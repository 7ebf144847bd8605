"""Adam's moments for a LoRA factor that any r × r change of the factor carries over exactly: tensors only.

Beyond the paper. A factor with r columns, say A (d × r), has the gradient g, which ``Ã = A·P``, ``B̃ = B·Q`` multiply by
Q from the right (B's by P). Adam's elementwise second moment can't follow that. These can:

    first moment        M ← β₁·M + (1 − β₁)·g                        (d × r)   M ← M·Q
    second moment       V ← β₂·V + (1 − β₂)·gᵀg/d                    (r × r)   V ← Qᵀ·V·Q
    row weights         ρ ← β₂·ρ + (1 − β₂)·[gᵢ·V̂⁻¹·gᵢᵀ/r]ᵢ          (d)       unchanged
    direction           D = M̂·V̂^(−1/2)/√ρ̂ , row by row              (d × r)

with Adam's bias corrections, marked by a hat. V is the second moment of LoRA-RITE (arXiv:2410.20625); the row weights
say which rows of the factor have large gradients, as Adam's second moment does entry by entry. The entries of D are of
order 1, as those of Adam's direction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scalora.maths.roots import inverse_root, least_damping

# Directions in which the gradient is below 1e-5 of its root mean square are rounding errors in float32. They are not
# scaled up further.
_DAMPING = 1e-10


class Corrections(NamedTuple):
    """Adam's bias corrections: what a moment is divided by, numbers or scalars on the moments' device.

    Attributes:
        first: ``1 − β₁ᵗ``.
        second: ``1 − β₂ᵗ``.
    """

    first: Tensor | float
    second: Tensor | float

    @classmethod
    def after(cls, step: int, betas: tuple[float, float]) -> Corrections:
        """Those of moments that have seen some steps.

        Args:
            step: t, the number of steps.
            betas: β₁ and β₂.
        """
        beta1, beta2 = betas
        return cls(1 - beta1**step, 1 - beta2**step)


def update_moments(
    gradients: Sequence[Float[Tensor, "layers d r"]],
    firsts: Sequence[Float[Tensor, "layers d r"]],
    seconds: Sequence[Float[Tensor, "layers r r"]],
    row_weights: Sequence[Float[Tensor, "layers d"]],
    *,
    betas: tuple[float, float],
    corrections: Corrections,
) -> None:
    """Add a step's gradients to the moments of factors, in place.

    The arguments have an entry for each shape, with all factors of it. The r × r matrices of all shapes are taken
    together: on a GPU, their many small operations take as long for one as for hundreds.

    Args:
        gradients: g of each factor, (layers, d, r).
        firsts: M, (layers, d, r); modified.
        seconds: V, (layers, r, r), in the solver's dtype; modified.
        row_weights: ρ, (layers, d); modified.
        betas: β₁ and β₂.
        corrections: those after this step.
    """
    beta1, beta2 = betas
    torch._foreach_lerp_(list(firsts), list(gradients), 1 - beta1)
    # In the solver's precision: fewer gradients than columns leave V singular, and a Gram matrix that is rounded to
    # float32 then has negative eigenvalues far beyond the damping.
    products = [_mean_product(gradient.to(second.dtype)) for gradient, second in zip(gradients, seconds, strict=True)]
    torch._foreach_lerp_(list(seconds), products, 1 - beta2)
    whitening = _whitening(torch.cat(list(seconds)) / corrections.second).to(gradients[0].dtype)
    of_shapes = torch.split(whitening, [len(second) for second in seconds])
    lengths = [
        torch.linalg.vector_norm(gradient @ matrix, dim=-1)
        for gradient, matrix in zip(gradients, of_shapes, strict=True)
    ]
    torch._foreach_mul_(lengths, lengths)
    torch._foreach_div_(lengths, whitening.shape[-1])
    torch._foreach_lerp_(list(row_weights), lengths, 1 - beta2)


def directions(
    firsts: Sequence[Float[Tensor, "layers d r"]],
    seconds: Sequence[Float[Tensor, "layers r r"]],
    row_weights: Sequence[Float[Tensor, "layers d"]],
    *,
    corrections: Corrections,
    eps: float,
) -> Iterator[Float[Tensor, "layers d r"]]:
    """The direction ``D = M̂·V̂^(−1/2)/√ρ̂`` of factors, which are given as to `update_moments`.

    One shape after the other, so that those of all need not be in memory at once.

    Args:
        firsts: M, (layers, d, r).
        seconds: V, (layers, r, r), in the solver's dtype.
        row_weights: ρ, (layers, d).
        corrections: those of the moments.
        eps: Adam's epsilon: gradients much smaller than this, and rows whose weight is smaller than its square, are not
            scaled up to order 1.

    Yields:
        D, (layers, d, r), to be multiplied by the learning rate.
    """
    second = torch.cat(list(seconds)) / corrections.second
    roots = inverse_root(second, relative_damping=_DAMPING, absolute_damping=eps**2).root.to(firsts[0].dtype)
    rows = torch._foreach_div(list(row_weights), corrections.second)
    torch._foreach_sqrt_(rows)
    torch._foreach_add_(rows, eps)
    torch._foreach_mul_(rows, corrections.first)
    for first, root, of_shape in zip(firsts, torch.split(roots, [len(s) for s in seconds]), rows, strict=True):
        yield (first @ root).div_(of_shape[..., None])


def _mean_product(gradient: Float[Tensor, "layers d r"]) -> Float[Tensor, "layers r r"]:
    product: Tensor = gradient.mT @ gradient / gradient.shape[1]
    return product


def _whitening(second: Float[Tensor, "layers r r"]) -> Float[Tensor, "layers r r"]:
    """A matrix H with ``H·Hᵀ = V⁻¹``; any such matrix gives the same row weights."""
    r = second.shape[-1]
    diagonal = second.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, 1).rsqrt()
    unit = second * scale[..., :, None] * scale[..., None, :]
    identity = torch.eye(r, dtype=second.dtype, device=second.device)
    # Fewer gradients than columns so far, or columns without any: what rounding left of the other directions must not
    # count as much as they.
    damping = max(r * _DAMPING, least_damping(unit))
    damped, _ = torch.linalg.cholesky_ex(unit + damping * identity)
    factor, info = torch.linalg.cholesky_ex(unit)
    singular = (info != 0) | ~(factor.diagonal(dim1=-2, dim2=-1).amin(-1).square() > damping)
    factor = torch.where(singular[..., None, None], damped, factor)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    return scale[..., :, None] * inverse.mT
