"""The unconstrained optimum over all adapters of a rank, from the SVD of the gradient (paper, section 3): the oracle.

It needs G itself and its SVD, and Adam's moments don't survive it: a start and a yardstick, not a step.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from scalora.maths.scaling import solver_dtype


def oracle_residual(G: Float[Tensor, "*layers m n"], rank: int) -> Float[Tensor, "*layers"]:
    """The least `relative_residual` any adapter of this rank can have: G's energy beyond its 2·rank largest values."""
    energy: Tensor = torch.linalg.svdvals(G.to(solver_dtype(G.device))).square()
    return energy[..., 2 * rank :].sum(-1) / energy.sum(-1)


def optimal_adapter(
    G: Float[Tensor, "*layers m n"], rank: int, *, target_norm: float = 1.0
) -> tuple[Float[Tensor, "*layers m r"], Float[Tensor, "*layers n r"]]:
    """The unconstrained optimum (the oracle): ``Ã = U_I/√(Lη)``, ``B̃ = V_J/√(Lη)`` from ``G = UΣVᵀ``.

    I and J split the 2·rank largest singular values; every split attains the same bound. This one deals them out in
    turn (I = 0, 2, 4, …, J = 1, 3, 5, …), so that both factors get gradients of like size. LoRA-GA's start
    (arXiv 2407.05000) is another split of the same optimum.

    Args:
        G: gradient of the loss in W, (…, m, n).
        rank: r.
        target_norm: ``1/√(Lη)``, the norm of each column of the result.

    Returns:
        ``(A, B)`` of shapes (…, m, r) and (…, n, r) in G's dtype, computed in float64.

    Raises:
        ValueError: rank is not between 1 and min(m, n)/2 (there are not 2·rank directions to choose from), or G is not
            finite.
    """
    if not 1 <= rank <= min(G.shape[-2:]) // 2:
        raise ValueError(
            f"rank={rank} does not fit a gradient of shape {tuple(G.shape[-2:])}: the optimum needs 2·rank singular "
            f"directions, so choose 1 ≤ rank ≤ {min(G.shape[-2:]) // 2}"
        )
    if not G.isfinite().all():
        raise ValueError("G has NaN or infinite entries: its singular vectors do not exist")
    U, _, Vh = torch.linalg.svd(G.to(solver_dtype(G.device)), full_matrices=False)
    A = U[..., :, 0 : 2 * rank : 2] * target_norm
    B = Vh.mT[..., :, 1 : 2 * rank : 2] * target_norm
    return A.to(G.dtype), B.to(G.dtype)
