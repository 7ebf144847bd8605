"""Metrics of a rescale (paper, section 5), computed when they are read: a step must not wait for the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scalora.maths.matrix import MatrixScaling
from scalora.maths.mode import COLUMN, MATRIX, SCALAR
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
        scaling: the factors or matrices, and how they were chosen.
        energy: squared Frobenius norm of what each layer's rescale moved into the remainder, (layers,).
    """

    scaling: Scaling | MatrixScaling
    energy: Float[Tensor, " layers"]


def remainder_energy(grams: Grams, coefficients: Float[Tensor, "layers r r"]) -> Float[Tensor, " layers"]:
    """``‖A·coefficients·Bᵀ‖²`` of each layer, from its inner products.

    Args:
        grams: the inner products of the layers before the rescale.
        coefficients: ``s·(1 − P·Qᵀ)``, (layers, r, r); 0 for a layer that is left alone.
    """
    AtA, BtB = grams.of_factors
    # A layer that is left alone moves nothing, even if it has NaN or infinite entries.
    moved = (coefficients != 0).any(-1).any(-1)
    return torch.where(moved, ((coefficients.mT @ AtA @ coefficients) * BtB).sum((-2, -1)), 0)


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
    counts = {"column": choice == COLUMN, "scalar": choice == SCALAR}
    if isinstance(parts[0].scaling, MatrixScaling):
        counts = {"matrix": choice == MATRIX}
    scaled = torch.stack([of_kind.sum() for of_kind in counts.values()])
    summary = {f"scalora/{kind}_share": count / total for kind, count in zip(counts, scaled, strict=True)}
    summary |= {
        "scalora/left_alone_share": (total - scaled.sum()) / total,
        "scalora/degenerate_share": degenerate.sum() / total,
        "scalora/merge_norm": torch.cat([energy.to(device) for _, energy in parts]).sum().sqrt(),
    }
    for index, name in enumerate(("alpha", "beta")):
        factors = torch.cat([_factors(scaling)[index].to(device).flatten() for scaling, _ in parts]).float()
        for q in QUANTILES:
            summary[f"scalora/{name}_p{round(100 * q)}"] = factors.quantile(q)
    return {key: value.item() for key, value in summary.items()}


def _factors(scaling: Scaling | MatrixScaling) -> tuple[Tensor, Tensor]:
    """By how much A and B are scaled: column by column, or the singular values of P and Q."""
    if isinstance(scaling, MatrixScaling):
        return torch.linalg.svdvals(scaling.P), torch.linalg.svdvals(scaling.Q)
    return scaling.alpha, scaling.beta


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
    lost = sum(remainder.discarded.sum().item() for remainder in factored)
    kept = sum(remainder.energy().item() for remainder in factored)
    return {
        "scalora/remainder_columns": float(max(remainder.columns for remainder in factored)),
        "scalora/discarded": math.sqrt(lost / kept) if kept else 0.0,
    }
