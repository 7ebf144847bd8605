"""Initialisations of the adapter that keep the model's function: the oracle's and a random one (paper, section 3)."""

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
    """Initialise every LoRA pair with the optimal factors for its gradient, and subtract their product from the base.

    The model's function does not change. This needs memory for the gradients of all adapted base weights at once.

    Args:
        model: a model with PEFT LoRA layers, before the first optimizer step; modified.
        train_step: computes the loss on a few batches and calls ``backward()`` (the convention of PEFT's
            ``preprocess_loraga``). Called once; the gradients of its backward passes add up.
        target_norm: ``1/√(Lη)``, the norm of every column of the factors.
        merge: where the product is subtracted: ``"dense"`` from the base weights, ``"factored"`` in a remainder beside
            them, ``"auto"`` as in `scalora.ScaLoraConfig`. The engine that is attached later needs the same setting.
        remainder_rank: the most columns that a compression of a factored remainder keeps.

    Raises:
        UnsupportedLayerError: a module is not supported, or its base weight is quantised and so has no gradient.
        ValueError: a layer got no gradient or a non-finite one, or is too small for 2·rank singular directions. No
            layer has been changed then.
    """
    pairs, _ = attach(model, merge, remainder_rank)
    starts = []
    for pair, G in zip(pairs, weight_gradients(model, pairs, train_step), strict=True):
        if G is None:
            raise ValueError(
                f"module {pair.name!r} got no gradient: train_step must compute a loss that depends on it, and call "
                "backward()"
            )
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
    """Initialise every LoRA pair with random columns of one norm, and subtract their product from the base.

    The model's function does not change. This is the control for `optimal_start`: as far from zero, but without knowing
    the gradient.

    Args:
        model: a model with PEFT LoRA layers, before the first optimizer step; modified.
        target_norm: the norm of every column of the factors.
        merge: where the product is subtracted: ``"dense"`` from the base weights, ``"factored"`` in a remainder beside
            them, ``"auto"`` as in `scalora.ScaLoraConfig`. The engine that is attached later needs the same setting.
        remainder_rank: the most columns that a compression of a factored remainder keeps.

    Raises:
        UnsupportedLayerError: a module is not supported.
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
    """Check that all base weights can have gradients.

    Args:
        pairs: the LoRA pairs to check.

    Raises:
        UnsupportedLayerError: a base weight is quantised.
    """
    for pair in pairs:
        if pair.quantised:
            raise UnsupportedLayerError(
                f"module {pair.name!r} has a quantised base weight, which has no gradient to initialise the adapter "
                "from: use PEFT's own initialisation"
            )


def weight_gradients(model: nn.Module, pairs: list[LoraPair], train_step: Callable[[], None]) -> list[Tensor | None]:
    """The gradients ``∂ℓ/∂W`` of base weights. Afterwards they are frozen as before, and the model has no gradients.

    Args:
        model: the model.
        pairs: LoRA pairs of the model, whose base weights' gradients are computed.
        train_step: computes the loss on a few batches and calls ``backward()``; called once.

    Returns:
        The gradient of each pair's base weight, (m, n); None for a weight that got none.

    Raises:
        UnsupportedLayerError: a base weight is quantised.
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
    """Replace the factors of LoRA pairs, and subtract the change of their product from the remainder.

    Args:
        pairs: LoRA pairs with remainders; modified.
        starts: the new factors A, (m, r), and B, (n, r), of each pair.
    """
    for pair, (A, B) in zip(pairs, starts, strict=True):
        pair.remainder.add(pair.weight, pair.scaling * pair.lora_B, pair.lora_A.mT)
        pair.lora_B.copy_(A)
        pair.lora_A.copy_(B.mT)
        pair.remainder.add(pair.weight, -pair.scaling * pair.lora_B, pair.lora_A.mT)
