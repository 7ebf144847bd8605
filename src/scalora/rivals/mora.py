"""MoRA: a trained square matrix between a parameter-free compression and decompression, on PEFT's layers.

Jiang et al., "MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning", arXiv:2405.12130. This is the paper's
rotation variant, which it recommends for small ranks (equation 9; type 6 in the authors' code, kongds/MoRA). With
``r̂ = ⌊√((m + n)·r)⌋``, the matrix M (r̂, r̂) has about as many entries as LoRA's two factors:

- Compression: x, of n entries, is repeated from its beginning up to a multiple of r̂ and split into groups of r̂. Group
  j is rotated by RoPE at position j: entries i and i + r̂/2 turn by the angle ``j·10000^(−2i/r̂)``.
- M is applied to each group.
- Decompression: the groups are concatenated, and repeated from the beginning or cut to m entries.

All three steps are linear, so that the update is a matrix and can be merged. Its rank can reach r̂ times the number of
groups. As in the authors' code, there is no scaling, and ``lora_alpha`` has no effect. RoPE needs an even r̂, so that an
odd one is lowered by one. The authors' code does the same, but rounds r̂ to the nearest integer, where the paper and
this module round down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from scalora.rivals.own_update import OwnUpdate, ReplacesUpdate

_ROPE_BASE = 10000.0


@dataclass(frozen=True)
class Mora(ReplacesUpdate):
    """MoRA. The setting ``r`` under ``lora:`` is the rank at which LoRA would have about as many parameters."""

    title: ClassVar[str] = "MoRA"

    def replace_update(self, name: str, layer: LoraLayer, adapter: str) -> None:
        """Replace the factors by the square matrix.

        Args:
            name: the layer's name.
            layer: the PEFT layer.
            adapter: the adapter's name.
        """
        size = math.isqrt((layer.in_features + layer.out_features) * layer.r[adapter]) // 2 * 2
        like = layer.lora_A[adapter].weight
        square = nn.Linear(size, size, bias=False, device=like.device, dtype=like.dtype)
        nn.init.zeros_(square.weight)
        layer.lora_A[adapter], layer.lora_B[adapter] = square, nn.Identity()
        layer.lora_variant[adapter] = _Square()


class _Square(OwnUpdate):
    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        output: Tensor = result + _output_of(module, active_adapter, module.lora_dropout[active_adapter](x))
        return output

    @torch.no_grad()
    def update(self, module: LoraLayer, adapter: str) -> Float[Tensor, "m n"]:
        weight = module.lora_A[adapter].weight
        return _output_of(module, adapter, torch.eye(module.in_features, dtype=weight.dtype, device=weight.device)).mT


def _output_of(layer: LoraLayer, adapter: str, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
    """What the adapter adds to the layer's output."""
    square = layer.lora_A[adapter]
    size = square.in_features
    groups = math.ceil(layer.in_features / size)
    compressed = _rotated(_repeated(x, groups * size).reshape(*x.shape[:-1], groups, size))
    return _repeated(square(compressed).flatten(-2), layer.out_features)


def _repeated(x: Float[Tensor, "*batch k"], size: int) -> Float[Tensor, "*batch size"]:
    """The last dimension brought to a size: cut, or repeated from its beginning as often as needed."""
    return torch.cat([x] * math.ceil(size / x.shape[-1]), dim=-1)[..., :size]


def _rotated(x: Float[Tensor, "*batch groups size"]) -> Float[Tensor, "*batch groups size"]:
    """RoPE, with the index of a group as its position."""
    groups, size = x.shape[-2:]
    precise = torch.promote_types(x.dtype, torch.float32)
    frequencies = _ROPE_BASE ** (-torch.arange(0, size, 2, dtype=precise, device=x.device) / size)
    angles = torch.outer(torch.arange(groups, dtype=precise, device=x.device), frequencies)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
