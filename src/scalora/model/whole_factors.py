"""The factors of an adapter side by side with those of its remainder, as a state dict has them, and parted again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scalora.model.layers import configured_scaling, experts_of, factor_keys
from scalora.model.matrices import matrices_of, stored_factors

if TYPE_CHECKING:
    from scalora.model.remainder_layer import RemainderLayer


def whole_factors(layer: RemainderLayer) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B of the whole update, at the adapter's own scaling.

    Args:
        layer: a layer with a factored remainder.
    """
    A, B = matrices_of(*layer.trained_factors, experts_of(layer))
    left, right = layer.factored_remainder().nonzero
    left = left / configured_scaling(layer, layer.trained_adapter)
    A, B = torch.cat([A, right.mT.to(A)], dim=-2), torch.cat([B, left.to(B)], dim=-1)
    return stored_factors(A, B, layer.trained_factors)


def part_factors(layer: RemainderLayer, beside: str, state_dict: dict[str, Any], prefix: str) -> None:
    """Part the factors in a state dict from the remainder that is in them, or that belongs to them beside them.

    If there is none, the layer's remainder is cleared: it belongs to other factors.

    Args:
        layer: a layer with a factored remainder, into which the state dict is loaded.
        beside: what the names of the remainder's tensors begin with.
        state_dict: the state dict; modified.
        prefix: what the names of the layer's tensors begin with.
    """
    key_A, key_B = (prefix + key for key in factor_keys(layer, layer.trained_adapter))
    lora_A, lora_B = state_dict.get(key_A), state_dict.get(key_B)
    if lora_A is None or lora_B is None:
        return
    (own_A, own_B), experts = layer.trained_factors, experts_of(layer)
    if lora_A.shape[1:] != own_A.shape[1:] or len(lora_B) != len(own_B) or len(lora_A) != lora_B.shape[1]:
        return  # torch says so, and loads none of them
    is_beside = f"{beside}left" in state_dict
    if len(lora_A) > len(own_A) and len(lora_A) % experts == 0:
        r, (A, B) = len(own_A) // experts, matrices_of(lora_A, lora_B, experts)
        state_dict[key_A], state_dict[key_B] = stored_factors(A[..., :r, :], B[..., :r], (lora_A, lora_B))
        if not is_beside:
            state_dict[f"{beside}left"] = configured_scaling(layer, layer.trained_adapter) * B[..., r:]
            state_dict[f"{beside}right"] = A[..., r:, :].mT
    elif len(lora_A) == len(own_A) and not is_beside:
        layer.factored_remainder().clear()
