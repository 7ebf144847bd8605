"""What one step would leave uncaptured of a layer's gradient: the loss bound's residual (paper, section 3).

Yardsticks that need G, (m, n), which the step itself never forms; `scalora inspect` shows them for the layers of a run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scalora.maths.mode import Mode
from scalora.maths.oracle import oracle_residual
from scalora.maths.scaling import (
    NormalEquations,
    choose_scaling,
    column_scaling,
    scalar_scaling,
    solver_dtype,
)


def captured_energy(
    equations: NormalEquations, v: Float[Tensor, "*layers k"] | Float[Tensor, "*layers 2"]
) -> Float[Tensor, "*layers"]:
    """How much of ``‖G‖²`` the step with v captures, ``‖G‖² − ‖G − Σ vₖ Xₖ‖² = 2λᵀv − vᵀMv``, without G.

    Args:
        equations: of the layers.
        v: column (…, 2r) or scalar (…, 2) values of ``Lη·[α²; β²]``.
    """
    v = _per_column(v, equations.rhs.shape[-1]).to(equations.rhs.dtype)
    return 2 * (equations.rhs * v).sum(-1) - torch.einsum("...i,...ij,...j->...", v, equations.matrix, v)


def relative_residual(
    G: Float[Tensor, "*layers m n"],
    A: Float[Tensor, "*layers m r"],
    B: Float[Tensor, "*layers n r"],
    v: Float[Tensor, "*layers 2*r"] | Float[Tensor, "*layers 2"] | None = None,
) -> Float[Tensor, "*layers"]:
    """What the loss bound leaves uncaptured, ``‖ΔW·L + G‖² / ‖G‖²``, for any choice of v (0 is perfect, 1 is nothing).

    A yardstick that needs G, (…, m, n); the step itself never does.

    Args:
        G: gradient of the loss in W.
        A: adapter factor, (…, m, r).
        B: adapter factor, (…, n, r).
        v: ``Lη·[α²; β²]``, (…, 2r) or (…, 2); ones (the adapter as it is, for Lη = 1) when None.
    """
    dtype = solver_dtype(G.device)
    G, A, B = G.to(dtype), A.to(dtype), B.to(dtype)
    r = A.shape[-1]
    v = torch.ones(2 * r, dtype=dtype, device=G.device) if v is None else _per_column(v.to(dtype), 2 * r)
    step = (A * v[..., None, :r]) @ (A.mT @ G) + (G @ (B * v[..., None, r:])) @ B.mT
    return (G - step).square().sum((-2, -1)) / G.square().sum((-2, -1))


class StepResiduals(NamedTuple):
    """What the loss bound leaves of a layer's gradient, ``‖ΔW·L + G‖² / ‖G‖²``: 0 is perfect, 1 is nothing.

    Attributes:
        none: the adapter as it is; a step that is too long for the bound leaves more than 1.
        scalar: the optimum of one factor for A and one for B, positive or not.
        column: the optimum of a factor for each column, positive or not.
        chosen: what `scalora.choose_scaling` takes; `none` where that leaves the layer alone.
        oracle: the best adapter of all, from the SVD of G.
    """

    none: float
    scalar: float
    column: float
    chosen: float
    oracle: float


def step_residuals(
    G: Float[Tensor, "m n"],
    A: Float[Tensor, "m r"],
    B: Float[Tensor, "n r"],
    *,
    target_norm: float = 1.0,
    mode: Mode = "auto",
    oracle_rank: int | None = None,
) -> StepResiduals:
    """How much of a gradient one more step of an adapter would leave uncaptured, by how it is scaled before.

    Needs G and its SVD: a yardstick, not a part of the method.

    Args:
        G: gradient of the loss in the layer's whole weight, (m, n), any float dtype.
        A: PEFT's ``lora_B.weight``, (m, r).
        B: PEFT's ``lora_A.weight`` transposed, (n, r).
        target_norm: ``1/√(Lη)`` (``1/(s·√(Lη))`` with PEFT's scaling s), which says how long the step of the adapter
            as it is would be.
        mode: which scalings may be chosen.
        oracle_rank: of the best adapter; r when None.

    Raises:
        ValueError: G has NaN or infinite entries, or is zero, so that there is nothing to capture.
    """
    if not G.isfinite().all():
        raise ValueError("the gradient has NaN or infinite entries")
    if not G.any():
        raise ValueError("the gradient is zero")
    dtype = solver_dtype(G.device)
    G, A, B = G.to(dtype), A.to(dtype), B.to(dtype)
    inputs = (A, B, G @ B, G.mT @ A)
    chosen = choose_scaling(*inputs, target_norm=target_norm, mode=mode)
    factors = torch.cat([chosen.alpha, chosen.beta])
    # v = Lη·[α²; β²] with 1/√(Lη) = target_norm.
    residual_of = {
        "none": torch.ones_like(factors) / target_norm**2,
        "scalar": scalar_scaling(*inputs),
        "column": column_scaling(*inputs),
        "chosen": (factors / target_norm).square(),
    }
    residuals = {name: float(relative_residual(G, A, B, v)) for name, v in residual_of.items()}
    return StepResiduals(**residuals, oracle=float(oracle_residual(G, oracle_rank or A.shape[1])))


def _per_column(v: Tensor, columns: int) -> Tensor:
    return v if v.shape[-1] == columns else v.repeat_interleave(columns // 2, dim=-1)
