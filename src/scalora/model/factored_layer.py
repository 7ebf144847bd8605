"""LoRA layers with a factored remainder: PEFT's forward pass, merge and unmerge plus the remainder (paper, section 6).

Built on PEFT's `LoraVariant`, the hook that DoRA also uses. Checked with PEFT 0.21, where `_embed` and
`_get_embed_scale` of the embedding layer are private.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, LoraVariant
from torch import Tensor, nn

REMAINDER = "frozen_remainder"
"""Name of the submodule of a PEFT layer that holds its remainder."""


class WithRemainder(LoraVariant):  # type: ignore[misc]
    """Plain LoRA plus the layer's factored remainder, which gets the input without dropout, like the base weight."""

    def supports_lora_conversion(self) -> bool:
        """Whether PEFT may convert the adapter to plain LoRA: no, because the remainder would be lost."""
        return False

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Add the outputs of the adapter and of the remainder to the base layer's output.

        Args:
            module: the PEFT layer.
            active_adapter: the adapter's name.
            x: the layer's input, (…, n), or token ids for an embedding.
            result: the base layer's output, (…, m).
            kwargs: other arguments of PEFT's hook; not used.

        Returns:
            The layer's output, (…, m).
        """
        remainder = getattr(module, REMAINDER)
        if isinstance(module, Embedding):
            lora_A, lora_B = module.lora_embedding_A[active_adapter], module.lora_embedding_B[active_adapter]
            update = (module._embed(x, lora_A.mT) @ lora_B.mT) * module.scaling[active_adapter]
            update = update + module._embed(x, remainder.right) @ remainder.left.mT
            if (scale := module._get_embed_scale()) is not None:
                update = update * scale.to(update.dtype)
        else:
            lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
            update = lora_B(lora_A(module.lora_dropout[active_adapter](x))) * module.scaling[active_adapter]
            update = update + nn.functional.linear(nn.functional.linear(x, remainder.right.mT), remainder.left)
        output: Tensor = result + update
        return output

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """A copy of the base weight with the whole update added, the adapter and the remainder.

        Args:
            module: the PEFT layer.
            active_adapter: the adapter's name.
            orig_weight: the base weight, as stored; not modified.
        """
        merged: Tensor = orig_weight + _whole_update(module, active_adapter).to(orig_weight.dtype)
        return merged

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """Add the whole update, the adapter and the remainder, to the base weight in place.

        Args:
            module: the PEFT layer.
            active_adapter: the adapter's name.
            orig_weight: the base weight, as stored; modified.
        """
        orig_weight.data += _whole_update(module, active_adapter)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """A copy of the merged weight with the whole update subtracted, the adapter and the remainder.

        Args:
            module: the PEFT layer.
            active_adapter: the adapter's name.
            orig_weight: the merged weight, as stored; not modified.
        """
        return orig_weight - _whole_update(module, active_adapter).to(orig_weight.dtype)


def _whole_update(module: LoraLayer, adapter: str) -> Tensor:
    """The update of the adapter and the remainder together, in the base weight's storage order."""
    remainder = getattr(module, REMAINDER).dense()
    stored_transposed = isinstance(module, Embedding) or getattr(module, "fan_in_fan_out", False)
    update: Tensor = module.get_delta_weight(adapter) + (remainder.mT if stored_transposed else remainder)
    return update
