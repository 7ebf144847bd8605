"""What a rescale did, as numbers to log: made when they are read, because a step must not wait for the device."""

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
"""Of the factors over all columns."""

LEFT_ALONE_BECAUSE = {
    "nonfinite": "its adapter or its gradient had NaN or infinite entries; check the loss, the data and the learning "
    "rate",
    "exploding": "its optimal factors were above a million or below a millionth; check target_norm or smoothness",
}
"""For each field of `Scaling` that says why a layer was skipped, the reason and what to look at."""


class Rescaled(NamedTuple):
    """What one rescale did to the layers of one rank.

    Attributes:
        scaling: the factors and how they were chosen.
        energy: squared Frobenius norm of each layer's remainder, (layers,).
    """

    scaling: Scaling
    energy: Float[Tensor, " layers"]


def remainder_energy(grams: Grams, coefficients: Float[Tensor, "layers r"]) -> Float[Tensor, " layers"]:
    """``‖A·diag(coefficients)·Bᵀ‖²`` of each layer, from its Grams.

    Args:
        grams: of the layers.
        coefficients: (layers, r); 0 for a column that stays as it is.
    """
    AtA, BtB = grams.of_factors
    products = coefficients[:, :, None] * coefficients[:, None, :]
    # A layer that is left alone because it is not finite has moved nothing.
    return torch.where(products == 0, 0, products * AtA * BtB).sum((-2, -1))


def summarise(parts: Sequence[Rescaled], total: int) -> dict[str, float]:
    """The metrics of one rescale; waits for the device.

    Args:
        parts: one for each rank, of the layers that had gradients.
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
    """Size and loss of factored remainders; empty if there is none. Waits for the device.

    Args:
        remainders: of all layers.

    Returns:
        ``scalora/remainder_columns``, the most of any layer, and ``scalora/discarded``, what compressions have left out
        as a share of the remainders' Frobenius norm.
    """
    factored = [remainder for remainder in remainders if isinstance(remainder, FactoredRemainder)]
    if not factored:
        return {}
    lost = sum(remainder.discarded.item() for remainder in factored)
    kept = sum(remainder.energy().item() for remainder in factored)
    return {
        "scalora/remainder_columns": float(max(remainder.left.shape[1] for remainder in factored)),
        "scalora/discarded": math.sqrt(lost / kept) if kept else 0.0,
    }
