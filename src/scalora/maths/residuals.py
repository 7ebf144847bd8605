"""Residuals of the loss bound: how much of a layer's gradient one step leaves uncaptured (paper, section 3).

Diagnostics: most need the full gradient G, (m, n), which a training step never forms. `scalora inspect` shows them for
the layers of a run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scalora.maths.matrix import matrix_scaling, matrix_scaling_of_grams, polar_scaling
from scalora.maths.mode import Mode, Optimum
from scalora.maths.oracle import oracle_residual
from scalora.maths.scaling import (
    Grams,
    NormalEquations,
    column_scaling,
    grams,
    scalar_scaling,
    scaling_of_grams,
    solver_dtype,
)


def captured_energy(
    equations: NormalEquations, v: Float[Tensor, "*layers k"] | Float[Tensor, "*layers 2"]
) -> Float[Tensor, "*layers"]:
    """How much of ``‖G‖²`` the step with v captures, ``‖G‖² − ‖G − Σ vₖ Xₖ‖² = 2λᵀv − vᵀMv``, without G.

    Args:
        equations: the normal equations of the layers, from `scalora.normal_equations`.
        v: ``Lη·[α²; β²]`` with a factor for each column, (…, 2r), or one for A and one for B, (…, 2).

    Returns:
        The captured part of ``‖G‖²`` of each layer, (…), in the dtype of the equations.
    """
    v = _per_column(v, equations.rhs.shape[-1]).to(equations.rhs.dtype)
    return 2 * (equations.rhs * v).sum(-1) - torch.einsum("...i,...ij,...j->...", v, equations.matrix, v)


def relative_residual(
    G: Float[Tensor, "*layers m n"],
    A: Float[Tensor, "*layers m r"],
    B: Float[Tensor, "*layers n r"],
    v: Float[Tensor, "*layers 2*r"] | Float[Tensor, "*layers 2"] | None = None,
) -> Float[Tensor, "*layers"]:
    """How much of the gradient a step leaves uncaptured, ``‖ΔW·L + G‖² / ‖G‖²``, for any v.

    A diagnostic that needs G; training steps don't.

    Args:
        G: gradient of the loss in W, (…, m, n), not zero.
        A: PEFT's ``lora_B.weight``, (…, m, r).
        B: PEFT's ``lora_A.weight`` transposed, (…, n, r).
        v: ``Lη·[α²; β²]`` with a factor for each column, (…, 2r), or one for A and one for B, (…, 2). None: ones, that
            is, the adapter as it is, with Lη = 1.

    Returns:
        The residual of each layer, (…), in float64 (float32 on devices without it): 0 if all of the gradient is
        captured, 1 if nothing is, more if the step is too long.
    """
    columns = 2 * A.shape[-1]
    v = torch.ones(columns, dtype=solver_dtype(G.device), device=G.device) if v is None else _per_column(v, columns)
    return matrix_residual(G, A, B, *_diagonal(v))


def matrix_residual(
    G: Float[Tensor, "*layers m n"],
    A: Float[Tensor, "*layers m r"],
    B: Float[Tensor, "*layers n r"],
    X: Float[Tensor, "*#layers r r"],
    Y: Float[Tensor, "*#layers r r"],
) -> Float[Tensor, "*layers"]:
    """How much of the gradient a step on A·P and B·Q leaves uncaptured, ``‖ΔW·L + G‖² / ‖G‖²``, for any P and Q.

    A diagnostic that needs G; training steps don't.

    Args:
        G: gradient of the loss in W, (…, m, n), not zero.
        A: PEFT's ``lora_B.weight``, (…, m, r).
        B: PEFT's ``lora_A.weight`` transposed, (…, n, r).
        X: ``Lη·PPᵀ``, (…, r, r), from `scalora.matrix_scaling` or `scalora.polar_scaling`, or any other.
        Y: ``Lη·QQᵀ``, (…, r, r).

    Returns:
        The residual of each layer, (…), in float64 (float32 on devices without it): 0 if all of the gradient is
        captured, 1 if nothing is, more if the step is too long.
    """
    G, A, B, X, Y = (t.to(solver_dtype(G.device)) for t in (G, A, B, X, Y))
    step = A @ X @ (A.mT @ G) + (G @ B) @ Y @ B.mT
    return (G - step).square().sum((-2, -1)) / G.square().sum((-2, -1))


class StepResiduals(NamedTuple):
    """Residuals ``‖ΔW·L + G‖² / ‖G‖²`` of one layer: 0 if all of the gradient is captured, 1 if nothing is.

    Attributes:
        none: of the adapter as it is; above 1 if its step is too long for the bound.
        scalar: of the best factor for A and for B, whether or not both are positive.
        column: of the best factor for each column, whether or not all are positive.
        polar: of orthonormal factors of norm ``1/√(Lη)``.
        matrix: of the best r × r matrix for A and for B.
        chosen: of the scaling that a rescale chooses; equal to `none` if it leaves the layer alone.
        oracle: of the best adapter of the given rank, from the SVD of G.
    """

    none: float
    scalar: float
    column: float
    polar: float
    matrix: float
    chosen: float
    oracle: float


def step_residuals(
    G: Float[Tensor, "m n"],
    A: Float[Tensor, "m r"],
    B: Float[Tensor, "n r"],
    *,
    target_norm: float = 1.0,
    mode: Mode = "auto",
    optimum: Optimum = "polar",
    oracle_rank: int | None = None,
) -> StepResiduals:
    """How much of a gradient one more step of an adapter leaves uncaptured, for each kind of scaling before the step.

    A diagnostic that needs G and its SVD; not a part of the method.

    Args:
        G: gradient of the loss in the layer's whole weight, (m, n), any float dtype.
        A: PEFT's ``lora_B.weight``, (m, r).
        B: PEFT's ``lora_A.weight`` transposed, (n, r).
        target_norm: ``1/√(Lη)``, or ``1/(s·√(Lη))`` with PEFT's scaling s: determines the length of the unscaled
            adapter's step.
        mode: which scalings may be chosen: ``"auto"`` (the paper's rule), ``"column"``, ``"scalar"`` or ``"matrix"``.
        optimum: which matrices are chosen with ``mode="matrix"``.
        oracle_rank: rank of the oracle's adapter; r if None.

    Raises:
        ValueError: G is zero, or has NaN or infinite entries.
    """
    if not G.isfinite().all():
        raise ValueError("the gradient has NaN or infinite entries")
    if not G.any():
        raise ValueError("the gradient is zero")
    dtype = solver_dtype(G.device)
    G, A, B = G.to(dtype), A.to(dtype), B.to(dtype)
    inputs = (A, B, G @ B, G.mT @ A)
    # X = Lη·PPᵀ and Y = Lη·QQᵀ with 1/√(Lη) = target_norm.
    residual_of = {
        "none": _diagonal(torch.full((2 * A.shape[1],), target_norm**-2, dtype=dtype, device=G.device)),
        "scalar": _diagonal(_per_column(scalar_scaling(*inputs), 2 * A.shape[1])),
        "column": _diagonal(column_scaling(*inputs)),
        "polar": polar_scaling(A, B),
        "matrix": matrix_scaling(*inputs),
        "chosen": _chosen(grams(*inputs), target_norm, mode, optimum),
    }
    residuals = {name: float(matrix_residual(G, A, B, X, Y)) for name, (X, Y) in residual_of.items()}
    return StepResiduals(**residuals, oracle=float(oracle_residual(G, oracle_rank or A.shape[1])))


def _chosen(grams: Grams, target_norm: float, mode: Mode, optimum: Optimum) -> tuple[Tensor, Tensor]:
    if mode == "matrix":
        matrices = matrix_scaling_of_grams(grams, target_norm=target_norm, optimum=optimum)
        return matrices.P @ matrices.P.mT / target_norm**2, matrices.Q @ matrices.Q.mT / target_norm**2
    chosen = scaling_of_grams(grams, target_norm=target_norm, mode=mode)
    return _diagonal((torch.cat([chosen.alpha, chosen.beta]) / target_norm).square())


def _diagonal(v: Float[Tensor, "*layers k"]) -> tuple[Tensor, Tensor]:
    """X and Y of factors for columns, from ``v = Lη·[α²; β²]``."""
    of_A, of_B = v.chunk(2, dim=-1)
    return torch.diag_embed(of_A), torch.diag_embed(of_B)


def _per_column(v: Tensor, columns: int) -> Tensor:
    return v if v.shape[-1] == columns else v.repeat_interleave(columns // 2, dim=-1)
