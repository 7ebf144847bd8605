"""`Mora`: a square matrix between parameter-free compression and decompression (Jiang et al., arXiv:2405.12130).

The paper's rotation variant, meant for small ranks (equation 9; type 6 in its code, kongds/MoRA). With
``r̂ = ⌊√((m + n)·r)⌋``, which gives M (r̂, r̂) about as many entries as LoRA's two factors have:

- compress: x (n) is continued from its beginning to a multiple of r̂ and cut into groups of r̂; group j is rotated by
  RoPE at position j, so entries i and i + r̂/2 turn by the angle ``j·10000^(−2i/r̂)``;
- M is applied to each group;
- decompress: the groups one after the other, continued from the beginning or cut to m entries.

All three are linear, so there is an update matrix to merge, of any rank up to that of the groups together. As in the
paper's code there is no scaling, and lora_alpha has no effect. RoPE needs an even r̂, so an odd one is lowered by one;
the paper's code does too, after rounding to nearest where the paper rounds down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import Tensor, nn

from scalora.model.adapters import UnsupportedLayerError
from scalora.rivals.method import Backward, Method

_ROPE_BASE = 10000.0


@dataclass(frozen=True)
class Mora(Method):
    """MoRA as a method: ``r`` is the rank of the LoRA that would have as many parameters."""

    ordinary_adapter: ClassVar[bool] = False

    def peft_config(self, settings: dict[str, Any]) -> PeftConfig | None:
        """A LoraConfig for PEFT to find the layers by.

        Raises:
            ValueError: another start than MoRA's zero is asked for; some of PEFT's change the base weights.
        """
        config = LoraConfig(**settings)
        if config.init_lora_weights is not True:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r}: MoRA's matrix starts at zero; leave the setting out"
            )
        return config

    def adapt(self, model: nn.Module, config: PeftConfig | None, backward: Backward) -> nn.Module:
        """Give PEFT's LoRA layers the square matrix in place of their factors.

        Raises:
            UnsupportedLayerError: a layer that is not an unquantised linear one, or an option of LoRA that MoRA does
                not have.
        """
        adapted = super().adapt(model, config, backward)
        for name, module in adapted.named_modules():
            if isinstance(module, LoraLayer):
                for adapter in module.active_adapters:
                    _make_square(name, module, adapter)
        return adapted


def _make_square(name: str, layer: LoraLayer, adapter: str) -> None:
    base = layer.get_base_layer()
    if type(layer) is not Linear or not isinstance(base, nn.Linear):
        raise UnsupportedLayerError(
            f"MoRA can't treat module {name!r}: {type(layer).__name__} over {type(base).__name__} is not a linear "
            "layer that can be merged into; leave it out of target_modules, or load the base without quantisation"
        )
    if adapter in layer.lora_variant or layer.lora_bias[adapter]:
        raise UnsupportedLayerError(
            f"MoRA can't treat module {name!r}: it takes neither a variant of LoRA nor a bias; set use_dora, lora_bias "
            "and the like to False"
        )
    size = math.isqrt((layer.in_features + layer.out_features) * layer.r[adapter]) // 2 * 2
    like = layer.lora_A[adapter].weight
    square = nn.Linear(size, size, bias=False, device=like.device, dtype=like.dtype)
    nn.init.zeros_(square.weight)
    layer.lora_A[adapter], layer.lora_B[adapter] = square, nn.Identity()
    layer.lora_variant[adapter] = _Square()


class _Square(LoraVariant):  # type: ignore[misc]
    def supports_lora_conversion(self) -> bool:
        return False

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        output: Tensor = result + _update_of(module, active_adapter, module.lora_dropout[active_adapter](x))
        return output

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + _update_matrix(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += _update_matrix(module, active_adapter)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - _update_matrix(module, active_adapter).to(orig_weight.dtype)


def _update_of(layer: LoraLayer, adapter: str, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch m"]:
    """What the adapter adds to the layer's output."""
    square = layer.lora_A[adapter]
    size = square.in_features
    groups = math.ceil(layer.in_features / size)
    compressed = _rotated(_continued(x, groups * size).reshape(*x.shape[:-1], groups, size))
    return _continued(square(compressed).flatten(-2), layer.out_features)


@torch.no_grad()
def _update_matrix(layer: LoraLayer, adapter: str) -> Float[Tensor, "m n"]:
    weight = layer.lora_A[adapter].weight
    return _update_of(layer, adapter, torch.eye(layer.in_features, dtype=weight.dtype, device=weight.device)).mT


def _continued(x: Float[Tensor, "*batch k"], size: int) -> Float[Tensor, "*batch size"]:
    """The last dimension brought to a size: cut, or continued from its beginning as often as needed."""
    return torch.cat([x] * math.ceil(size / x.shape[-1]), dim=-1)[..., :size]


def _rotated(x: Float[Tensor, "*batch groups size"]) -> Float[Tensor, "*batch groups size"]:
    """RoPE with a group's index as its position."""
    groups, size = x.shape[-2:]
    precise = torch.promote_types(x.dtype, torch.float32)
    frequencies = _ROPE_BASE ** (-torch.arange(0, size, 2, dtype=precise, device=x.device) / size)
    angles = torch.outer(torch.arange(groups, dtype=precise, device=x.device), frequencies)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
