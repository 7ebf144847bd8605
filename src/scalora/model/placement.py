"""Chooses where the remainders go, and attaches one to each layer (paper, section 6)."""

from __future__ import annotations

import torch
from peft.tuners.lora.layer import ParamWrapper

from scalora.config import Merge
from scalora.model.adapters import LoraPair, refuse
from scalora.model.factor_guard import FactorGuard
from scalora.model.parameter_layer import ParameterRemainderLayer
from scalora.model.remainder_layer import REMAINDER, RemainderLayer, give_remainder
from scalora.model.tied_factors import TransposedRemainder
from scalora.rescale.eight_bit import EightBitRemainder
from scalora.rescale.remainder import HALF, DenseRemainder, FactoredRemainder, Remainder
from scalora.rescale.stochastic import StochasticRemainder

# Bytes per entry of a factored remainder: float32.
_BYTES_OF_FACTORS = 4

# Bytes that remainders keep per entry of a half-precision weight.
_BYTES_ROUNDED_OFF: dict[Merge, int] = {"dense": 2, "dense_8bit": 1}


def kind_of(remainder: Remainder) -> Merge:
    """The setting that gives a remainder of this kind; not ``"auto"``.

    Args:
        remainder: the remainder.
    """
    if isinstance(remainder, FactoredRemainder):
        return "factored"
    if isinstance(remainder, EightBitRemainder):
        return "dense_8bit"
    return "stochastic" if isinstance(remainder, StochasticRemainder) else "dense"


def bytes_beside(merge: Merge, dtype: torch.dtype) -> int:
    """Bytes that a remainder which is merged into the weights keeps beside each of their entries.

    Args:
        merge: kind of the remainder, not ``"auto"``.
        dtype: dtype of the weights.
    """
    return _BYTES_ROUNDED_OFF.get(merge, 0) if dtype in HALF else 0


def resolve_merge(pairs: list[LoraPair], merge: Merge, max_rank: int) -> Merge:
    """Resolve ``"auto"`` to ``"dense"`` or ``"factored"`` for a model.

    - A model that already has remainders keeps their kind.
    - Quantised weights can't be merged into, and neither can weights that another layer (a tied embedding) or another
      adapter uses: factored.
    - Float32 and float64 weights can, at no cost in memory or time: dense, as in the paper.
    - Dense takes 2 bytes per entry of a half-precision weight; factored takes 4 bytes per entry of the factors and time
      in every forward and backward pass. Factored where it takes at most half of the memory, which also bounds the time
      (docs/cost.md).
    - Never 8-bit dense or stochastic: their rounding errors add up, if slowly, and no default should cost precision
      (docs/precision.md).

    Args:
        pairs: the LoRA pairs of one model, at least one.
        merge: the setting. All but ``"auto"`` are returned unchanged.
        max_rank: columns that a factored remainder would keep.
    """
    if merge != "auto":
        return merge
    if (present := getattr(pairs[0].layer, REMAINDER, None)) is not None:
        return kind_of(present)
    if any(pair.quantised or pair.tied or pair.twin or pair.other_adapters for pair in pairs):
        return "factored"
    half = [pair for pair in pairs if pair.weight.dtype in HALF]
    factors = sum(_BYTES_OF_FACTORS * 2 * max_rank * (pair.m + pair.n) * pair.experts for pair in half)
    beside_weights = sum(bytes_beside("dense", pair.weight.dtype) * pair.m * pair.n * pair.experts for pair in half)
    return "factored" if 0 < 2 * factors <= beside_weights else "dense"


def check_places(pairs: list[LoraPair], merge: Merge, max_rank: int) -> None:
    """Check that `place_remainders` can do its work; changes nothing.

    Args:
        pairs: the LoRA pairs of one model, at least one.
        merge: kind of the remainder: ``"dense"``, ``"dense_8bit"``, ``"stochastic"``, ``"factored"``, or ``"auto"`` to
            choose by the base weights.
        max_rank: the most columns that a compression of a factored remainder keeps.

    Raises:
        UnsupportedLayerError: the remainder would be merged and a weight is quantised, tied or used by another adapter;
            or a layer already has a remainder of another kind.
    """
    kind = resolve_merge(pairs, merge, max_rank)
    for pair in pairs:
        if kind != "factored":
            _check_mergeable(pair)
        _check_present(pair, kind)


def place_remainders(pairs: list[LoraPair], merge: Merge, max_rank: int) -> None:
    """Attach a remainder to every layer. A layer that already has one keeps it.

    Args:
        pairs: the LoRA pairs of one model, at least one.
        merge: kind of the remainder: ``"dense"``, ``"dense_8bit"``, ``"stochastic"``, ``"factored"``, or ``"auto"`` to
            choose by the base weights.
        max_rank: the most columns that a compression of a factored remainder keeps; also set on existing remainders.

    Raises:
        UnsupportedLayerError: as `check_places`. No layer has been changed then.
    """
    kind = resolve_merge(pairs, merge, max_rank)
    check_places(pairs, merge, max_rank)
    new = []
    for pair in pairs:
        if isinstance(pair.layer, RemainderLayer):
            if isinstance(pair.remainder, FactoredRemainder):
                pair.remainder.resize(max_rank)
            continue
        of_parameter = isinstance(pair.layer, ParamWrapper)
        mixin = ParameterRemainderLayer if of_parameter else RemainderLayer
        give_remainder(pair.layer, mixin, pair.adapter, _new(pair, max_rank, kind), base_is_tied=bool(pair.tied))
        if pair.twin is not None and isinstance(pair.remainder, FactoredRemainder):
            transposed = TransposedRemainder(pair.remainder)
            give_remainder(pair.twin.layer, mixin, pair.adapter, transposed, base_is_tied=bool(pair.tied))
        new.append(pair.layer)
    if new:
        guard = FactorGuard([pair.layer for pair in pairs])
        for layer in (layer for pair in pairs for layer in pair.layers):
            layer.factor_guard = guard


def _new(pair: LoraPair, max_rank: int, kind: Merge) -> Remainder:
    if kind == "stochastic":
        return StochasticRemainder(pair.weight, transposed=pair.transposed, name=pair.name)
    if kind == "dense_8bit":
        return EightBitRemainder(pair.weight, transposed=pair.transposed)
    if kind == "dense":
        return DenseRemainder(pair.weight, transposed=pair.transposed)
    dtype, device = pair.dtype, pair.lora_A.device
    return FactoredRemainder(pair.m, pair.n, max_rank, pair.r, dtype=dtype, device=device, experts=pair.experts)


def _check_mergeable(pair: LoraPair) -> None:
    if pair.twin is not None:
        refuse(pair.name, f"it shares its factors with {pair.twin.name!r}, and not its weight", "set merge='factored'")
    reasons = {
        f"is quantised ({type(pair.weight).__name__}, {pair.weight.dtype})": pair.quantised,
        f"is tied ({' = '.join(pair.tied)})": bool(pair.tied),
        f"is adapter {', '.join(map(repr, pair.other_adapters))}'s, too": bool(pair.other_adapters),
    }
    for reason, holds in reasons.items():
        if holds:
            refuse(pair.name, f"its base weight {reason} and can't take a merge", "set merge='factored'")


def _check_present(pair: LoraPair, wanted: Merge) -> None:
    present = getattr(pair.layer, REMAINDER, None)
    if present is None:
        return
    if (other := kind_of(present)) != wanted:
        refuse(pair.name, f"it already has a {other} remainder", f"set merge={other!r} instead of merge={wanted!r}")
    if pair.layer.trained_adapter != pair.adapter:
        refuse(
            pair.name,
            f"it has the remainder of adapter {pair.layer.trained_adapter!r}, but {pair.adapter!r} is active",
            f"call set_adapter({pair.layer.trained_adapter!r}), or train a model that is loaded anew",
        )
