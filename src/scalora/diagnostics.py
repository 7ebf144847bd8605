"""What is known of one layer: the spectrum of its update, what its next step would leave uncaptured (paper, section 3).

Tensors only; `scalora inspect` shows it for every layer of a run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scalora.lowrank import effective_rank_of_values, rank_of_values
from scalora.scaling import (
    Mode,
    choose_scaling,
    column_scaling,
    oracle_residual,
    relative_residual,
    scalar_scaling,
    solver_dtype,
)


class UpdateFigures(NamedTuple):
    """What an update's singular values say.

    Attributes:
        numerical_rank: how many exceed `rtol` times the largest, as `scalora.numerical_rank`; 0 for a zero update.
        effective_rank: ``exp`` of the entropy of their shares, as `scalora.effective_rank`; 0 for a zero update.
        norm: the Frobenius norm.
        adapter_rank: the columns of an ordinary adapter that leaves out at most `rtol` of the Frobenius norm.
    """

    numerical_rank: int
    effective_rank: float
    norm: float
    adapter_rank: int


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


def update_figures(singular_values: Float[Tensor, " k"], rtol: float = 1e-3) -> UpdateFigures:
    """Ranks and norm of an update from its singular values, so that one decomposition is enough for all of them.

    Args:
        singular_values: descending; all of those that are not 0.
        rtol: of the numerical rank and of the adapter's error; the default is the one of `scalora.numerical_rank` and
            of `scalora.export_adapter`.
    """
    values = singular_values.double()
    left_out = values.square().flip(0).cumsum(0).flip(0)  # by an adapter with 0, 1, 2, … columns
    return UpdateFigures(
        numerical_rank=rank_of_values(values, rtol),
        effective_rank=effective_rank_of_values(values),
        norm=float(left_out[0].sqrt()),
        adapter_rank=int((left_out > rtol**2 * left_out[0]).sum()),
    )


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
