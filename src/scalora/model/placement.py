"""Chooses between dense and factored remainders and attaches one to each layer (paper, section 6)."""

from __future__ import annotations

from scalora.config import Merge
from scalora.model.adapters import LoraPair, refuse
from scalora.model.factored_layer import REMAINDER, WithRemainder
from scalora.rescale.remainder import HALF, DenseRemainder, FactoredRemainder

# Bytes per entry of a factored remainder: float32.
_BYTES_OF_FACTORS = 4

# Bytes that a dense remainder keeps per entry of a half-precision weight.
_BYTES_ROUNDED_OFF = 2


def resolve_merge(pairs: list[LoraPair], merge: Merge, max_rank: int) -> Merge:
    """Resolve ``"auto"`` to ``"dense"`` or ``"factored"`` for a model.

    - A model that already has remainders keeps their kind.
    - Quantised weights can't be merged into: factored.
    - Float32 and float64 weights can, at no cost in memory or time: dense, as in the paper.
    - Dense takes 2 bytes per entry of a half-precision weight; factored takes 4 bytes per entry of the factors and time
      in every forward and backward pass. Factored where it takes at most half of the memory, which also bounds the time
      (docs/cost.md).

    Args:
        pairs: the LoRA pairs of one model, at least one.
        merge: the setting. ``"dense"`` and ``"factored"`` are returned unchanged.
        max_rank: columns that a factored remainder would keep.
    """
    if merge != "auto":
        return merge
    if (present := getattr(pairs[0].layer, REMAINDER, None)) is not None:
        return "factored" if isinstance(present, FactoredRemainder) else "dense"
    if any(pair.quantised for pair in pairs):
        return "factored"
    half = [pair for pair in pairs if pair.weight.dtype in HALF]
    factors = sum(_BYTES_OF_FACTORS * 2 * max_rank * (pair.m + pair.n) for pair in half)
    beside_weights = sum(_BYTES_ROUNDED_OFF * pair.weight.numel() for pair in half)
    return "factored" if 0 < 2 * factors <= beside_weights else "dense"


def place_remainders(pairs: list[LoraPair], merge: Merge, max_rank: int) -> None:
    """Attach a remainder to every layer. A layer that already has one keeps it.

    Args:
        pairs: the LoRA pairs of one model, at least one.
        merge: kind of the remainder: ``"dense"``, ``"factored"``, or ``"auto"`` to choose by the base weights.
        max_rank: the most columns that a compression of a factored remainder keeps; also set on existing remainders.

    Raises:
        UnsupportedLayerError: the remainder would be dense and a weight is quantised, or a layer already has a
            remainder of the other kind. No layer has been changed then.
    """
    factored = resolve_merge(pairs, merge, max_rank) == "factored"
    for pair in pairs:
        _check_place(pair, factored=factored)
    for pair in pairs:
        if (present := getattr(pair.layer, REMAINDER, None)) is not None:
            if isinstance(present, FactoredRemainder):
                present.max_rank = max_rank
        elif factored:
            remainder = FactoredRemainder(pair.m, pair.n, max_rank, dtype=pair.lora_A.dtype, device=pair.lora_A.device)
            pair.layer.add_module(REMAINDER, remainder)
            pair.layer.lora_variant[pair.adapter] = WithRemainder()
        else:
            pair.layer.add_module(REMAINDER, DenseRemainder(pair.weight, transposed=pair.transposed))


def _check_place(pair: LoraPair, *, factored: bool) -> None:
    if pair.quantised and not factored:
        refuse(
            pair.name,
            f"its base weight is quantised ({type(pair.weight).__name__}, {pair.weight.dtype}) and can't take a merge",
            "set merge='factored'",
        )
    present = getattr(pair.layer, REMAINDER, None)
    if present is not None and isinstance(present, FactoredRemainder) != factored:
        wanted, other = ("factored", "dense") if factored else ("dense", "factored")
        refuse(pair.name, f"it already has a {other} remainder", f"set merge={other!r} instead of merge={wanted!r}")
