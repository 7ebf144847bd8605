"""The floor of a rescale of a model's layers."""

from __future__ import annotations

from functools import reduce

from scalora.adapters import LoraPair
from scalora.cost import RescaleWork, rescale_work
from scalora.remainder import HALF


def rescale_work_of(pairs: list[LoraPair], remainder_rank: int | None) -> RescaleWork:
    """`rescale_work` of all layers together, with Adam's two moments.

    Args:
        pairs: at least one.
        remainder_rank: of their factored remainders; None for dense ones, which keep 2 bytes beside an entry of a
            half-precision weight.
    """
    return reduce(
        RescaleWork.__add__,
        (
            rescale_work(
                pair.lora_B.shape[0],
                pair.lora_A.shape[1],
                pair.lora_A.shape[0],
                weight_bytes=pair.weight.element_size() + (2 if pair.weight.dtype in HALF else 0),
                remainder_rank=remainder_rank,
            )
            for pair in pairs
        ),
    )
