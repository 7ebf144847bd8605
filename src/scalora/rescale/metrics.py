"""Metrics of a rescale (paper, section 5), computed when they are read: a step must not wait for the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scalora.maths.mode import COLUMN, SCALAR
from scalora.maths.scaling import Grams, Scaling
from scalora.rescale.remainder import FactoredRemainder, Remainder

QUANTILES = (0.1, 0.5, 0.9)
"""Quantiles that are logged of the factors over all columns."""

LEFT_ALONE_BECAUSE = {
    "nonfinite": "the adapter or its gradient has NaN or infinite entries; check the loss, the data and the learning "
    "rate",
    "exploding": "the optimal factors are above a million or below a millionth; check target_norm or smoothness",
}
"""For each field of `Scaling` that says why a layer was left alone, the reason and what to check."""


class Rescaled(NamedTuple):
    """The outcome of one rescale for the layers of one rank.

    Attributes:
        scaling: the factors and how they were chosen.
        energy: squared Frobenius norm of what each layer's rescale moved into the remainder, (layers,).
    """

    scaling: Scaling
    energy: Float[Tensor, " layers"]


def remainder_energy(grams: Grams, coefficients: Float[Tensor, "layers r"]) -> Float[Tensor, " layers"]:
    """``‖A·diag(coefficients)·Bᵀ‖²`` of each layer, from its inner products.

    Args:
        grams: the inner products of the layers before the rescale.
        coefficients: ``s·(1 − α⊙β)``, (layers, r); 0 for a column that is left alone.
    """
    AtA, BtB = grams.of_factors
    products = coefficients[:, :, None] * coefficients[:, None, :]
    # A layer that is left alone moves nothing, even if it has NaN or infinite entries.
    return torch.where(products == 0, 0, products * AtA * BtB).sum((-2, -1))


def summarise(parts: Sequence[Rescaled], total: int) -> dict[str, float]:
    """The metrics of one rescale. Waits for the device.

    Args:
        parts: the outcome for the layers that had gradients, one entry for each rank.
        total: number of layers, with and without gradients.
    """
    if not parts:
        return {"scalora/left_alone_share": 1.0}
    device = parts[0].energy.device
    choice = torch.cat([scaling.choice.to(device) for scaling, _ in parts])
    degenerate = torch.cat([scaling.degenerate.to(device) for scaling, _ in parts])
    column, scalar = (choice == COLUMN).sum(), (choice == SCALAR).sum()
    summary = {
        "scalora/column_share": column / total,
        "scalora/scalar_share": scalar / total,
        "scalora/left_alone_share": (total - column - scalar) / total,
        "scalora/degenerate_share": degenerate.sum() / total,
        "scalora/merge_norm": torch.cat([energy.to(device) for _, energy in parts]).sum().sqrt(),
    }
    for name in ("alpha", "beta"):
        factors = torch.cat([getattr(scaling, name).to(device).flatten() for scaling, _ in parts]).float()
        for q in QUANTILES:
            summary[f"scalora/{name}_p{round(100 * q)}"] = factors.quantile(q)
    return {key: value.item() for key, value in summary.items()}


def factored_metrics(remainders: Sequence[Remainder]) -> dict[str, float]:
    """The size of factored remainders, and what compressions have left out of them. Waits for the device.

    Args:
        remainders: the remainders of all layers.

    Returns:
        ``scalora/remainder_columns``, the largest number of columns of any layer, and ``scalora/discarded``, the
        Frobenius norm of what compressions have left out, relative to that of the remainders. Empty without factored
        remainders.
    """
    factored = [remainder for remainder in remainders if isinstance(remainder, FactoredRemainder)]
    if not factored:
        return {}
    lost = sum(remainder.discarded.item() for remainder in factored)
    kept = sum(remainder.energy().item() for remainder in factored)
    return {
        "scalora/remainder_columns": float(max(remainder.columns for remainder in factored)),
        "scalora/discarded": math.sqrt(lost / kept) if kept else 0.0,
    }
