"""What methods have in common that replace LoRA's update by another matrix, on PEFT's linear layers."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import Tensor, nn

from scalora.model.adapters import UnsupportedLayerError


class OwnUpdate(LoraVariant):  # type: ignore[misc]
    """A variant of LoRA that merges a matrix of its own."""

    def supports_lora_conversion(self) -> bool:
        """Whether PEFT may convert it to LoRA: no."""
        return False

    def update(self, module: LoraLayer, adapter: str) -> Tensor:
        """What the adapter adds to the weight, (m, n), without gradients.

        Args:
            module: the layer.
            adapter: the adapter's name.
        """
        raise NotImplementedError

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """A copy of the weight with the update.

        Args:
            module: the layer.
            active_adapter: the adapter's name.
            orig_weight: the weight.
        """
        return orig_weight + self.update(module, active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """Add the update to the weight in place.

        Args:
            module: the layer.
            active_adapter: the adapter's name.
            orig_weight: the weight.
        """
        orig_weight.data += self.update(module, active_adapter)

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """A copy of the weight without the update.

        Args:
            module: the layer.
            active_adapter: the adapter's name.
            orig_weight: the weight.
        """
        return orig_weight - self.update(module, active_adapter).to(orig_weight.dtype)


def check_layer(method: str, name: str, layer: Any, adapter: str) -> None:
    """Check that a layer is plain LoRA over an unquantised linear layer.

    Args:
        method: the method, for the message.
        name: the layer's name.
        layer: the PEFT layer.
        adapter: the adapter's name.

    Raises:
        UnsupportedLayerError: it is not.
    """
    base = layer.get_base_layer()
    if type(layer) is not Linear or not isinstance(base, nn.Linear):
        raise UnsupportedLayerError(
            f"{method} can't adapt module {name!r}: {type(layer).__name__} over {type(base).__name__} is not an "
            "unquantised linear layer; leave it out of target_modules, or load the base without quantisation"
        )
    if adapter in layer.lora_variant or layer.lora_bias[adapter]:
        raise UnsupportedLayerError(
            f"{method} can't adapt module {name!r}: it has neither variants of LoRA nor a bias; set use_dora, "
            "lora_bias and similar options to False"
        )
