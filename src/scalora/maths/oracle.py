"""The oracle: the best adapter of a given rank, from the SVD of the gradient (paper, section 3).

It needs G itself and its SVD, and Adam's moments can't be carried to it. So it serves as an initialisation and as a
reference for other adapters, not as a training step.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from scalora.maths.scaling import solver_dtype


def oracle_residual(G: Float[Tensor, "*layers m n"], rank: int) -> Float[Tensor, "*layers"]:
    """The smallest `relative_residual` of any adapter of a rank: G's energy beyond its 2·rank largest singular values.

    Args:
        G: gradient of the loss in W, (…, m, n), finite and not zero.
        rank: r.

    Returns:
        ``Σ_{i > 2r} σᵢ² / Σᵢ σᵢ²`` of each layer, (…), in float64 (float32 on devices without it).
    """
    energy: Tensor = torch.linalg.svdvals(G.to(solver_dtype(G.device))).square()
    return energy[..., 2 * rank :].sum(-1) / energy.sum(-1)


def optimal_adapter(
    G: Float[Tensor, "*layers m n"], rank: int, *, target_norm: float = 1.0
) -> tuple[Float[Tensor, "*layers m r"], Float[Tensor, "*layers n r"]]:
    """The unconstrained optimum (the oracle): ``Ã = U_I/√(Lη)``, ``B̃ = V_J/√(Lη)`` from ``G = UΣVᵀ``.

    I and J partition the 2·rank largest singular values; every partition attains the same bound. This one alternates
    (I = 0, 2, 4, …, J = 1, 3, 5, …), so that both factors get gradients of similar size. LoRA-GA's initialisation
    (arXiv 2407.05000) is another partition of the same optimum.

    Args:
        G: gradient of the loss in W, (…, m, n), finite, any float dtype.
        rank: r, at most ``min(m, n)/2``.
        target_norm: ``1/√(Lη)``, the norm of each column of the result.

    Returns:
        A, (…, m, r), and B, (…, n, r), in G's dtype; computed in float64 (float32 on devices without it).

    Raises:
        ValueError: `rank` is not between 1 and ``min(m, n)/2`` (G does not have 2·rank singular directions), or G has
            NaN or infinite entries.
    """
    if not 1 <= rank <= min(G.shape[-2:]) // 2:
        raise ValueError(
            f"rank={rank} does not fit a gradient of shape {tuple(G.shape[-2:])}: the optimum needs 2·rank singular "
            f"directions; choose 1 ≤ rank ≤ {min(G.shape[-2:]) // 2}"
        )
    if not G.isfinite().all():
        raise ValueError(
            "the gradient has NaN or infinite entries, so it has no singular vectors: check the loss and the data"
        )
    U, _, Vh = torch.linalg.svd(G.to(solver_dtype(G.device)), full_matrices=False)
    A = U[..., :, 0 : 2 * rank : 2] * target_norm
    B = Vh.mT[..., :, 1 : 2 * rank : 2] * target_norm
    return A.to(G.dtype), B.to(G.dtype)
