"""Starts that are taken off the base weight, so that the function does not change: the oracle's, and a random one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from scalora.config import Merge, ScaLoraConfig
from scalora.maths.oracle import optimal_adapter
from scalora.model.adapters import LoraPair, UnsupportedLayerError
from scalora.saving.attach import attach


def optimal_start(
    model: nn.Module,
    train_step: Callable[[], None],
    *,
    target_norm: float = 1.0,
    merge: Merge = ScaLoraConfig.merge,
    remainder_rank: int = ScaLoraConfig.remainder_rank,
) -> None:
    """Give every LoRA pair the optimal factors for its gradient, and take their product off the base weight.

    The model's function does not change. Needs memory for the gradients of all adapted weights, once.

    Args:
        model: with PEFT LoRA layers, before the optimizer has stepped.
        train_step: computes the loss on a few batches and calls ``backward()``, the convention of PEFT's
            ``preprocess_loraga``; gradients are summed over its calls.
        target_norm: ``1/√(Lη)``, the norm of every column.
        merge: where the product is taken off, as in `scalora.ScaLoraConfig`; the engine goes on with the same.
        remainder_rank: likewise.

    Raises:
        UnsupportedLayerError: as `scalora.ScaLora`.
        ValueError: a layer got no gradient, a non-finite one, or is too small for 2·rank directions. No layer has been
            changed then.
    """
    pairs, _ = attach(model, merge, remainder_rank)
    starts = []
    for pair, G in zip(pairs, weight_gradients(model, pairs, train_step), strict=True):
        if G is None:
            raise ValueError(f"module {pair.name!r} got no gradient from train_step: does it call backward()?")
        try:
            starts.append(optimal_adapter(G, pair.r, target_norm=target_norm))
        except ValueError as error:
            raise ValueError(f"module {pair.name!r}: {error}") from None
    replace_factors(pairs, starts)


def random_start(
    model: nn.Module,
    *,
    target_norm: float = 1.0,
    merge: Merge = ScaLoraConfig.merge,
    remainder_rank: int = ScaLoraConfig.remainder_rank,
) -> None:
    """Give every LoRA pair random columns of one norm, and take their product off the base weight.

    What the oracle's start is to be compared with: as far from zero, but blind.

    Args:
        model: as for `optimal_start`.
        target_norm: of every column.
        merge: as for `optimal_start`.
        remainder_rank: likewise.

    Raises:
        UnsupportedLayerError: as `scalora.ScaLora`.
    """
    pairs, _ = attach(model, merge, remainder_rank)
    starts = [
        (
            target_norm * nn.functional.normalize(torch.randn_like(pair.lora_B), dim=0),
            target_norm * nn.functional.normalize(torch.randn_like(pair.lora_A), dim=1).mT,
        )
        for pair in pairs
    ]
    replace_factors(pairs, starts)


def require_weight_gradients(pairs: list[LoraPair]) -> None:
    """Check that the base weights can have gradients.

    Raises:
        UnsupportedLayerError: one is quantised.
    """
    for pair in pairs:
        if pair.quantised:
            raise UnsupportedLayerError(
                f"module {pair.name!r} has a quantised base weight, which has no gradient to start from: start from "
                "PEFT's own initialisation"
            )


def weight_gradients(model: nn.Module, pairs: list[LoraPair], train_step: Callable[[], None]) -> list[Tensor | None]:
    """``∂ℓ/∂W`` (m, n) of every pair's base weight, None where there is none.

    The model is left as frozen as it was, and without gradients.

    Args:
        model: of the pairs.
        pairs: whose weights are meant.
        train_step: computes the loss on a few batches and calls ``backward()``.

    Raises:
        UnsupportedLayerError: a weight is quantised.
    """
    require_weight_gradients(pairs)
    trained_before = [pair.weight.requires_grad for pair in pairs]
    try:
        for pair in pairs:
            pair.weight.requires_grad_(True)
        train_step()
        return [None if pair.weight.grad is None else pair.oriented(pair.weight.grad) for pair in pairs]
    finally:
        for pair, trained in zip(pairs, trained_before, strict=True):
            pair.weight.requires_grad_(trained)
        model.zero_grad(set_to_none=True)


@torch.no_grad()
def replace_factors(pairs: list[LoraPair], starts: list[tuple[Tensor, Tensor]]) -> None:
    """Give attached pairs new factors (A, B); what their product changes by goes to the remainder."""
    for pair, (A, B) in zip(pairs, starts, strict=True):
        pair.remainder.add(pair.weight, pair.scaling * pair.lora_B, pair.lora_A.mT)
        pair.lora_B.copy_(A)
        pair.lora_A.copy_(B.mT)
        pair.remainder.add(pair.weight, -pair.scaling * pair.lora_B, pair.lora_A.mT)
