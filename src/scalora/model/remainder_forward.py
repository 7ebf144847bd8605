"""The forward pass of a LoRA layer with a factored remainder (paper, section 6).

Built on PEFT's `LoraVariant`, the hook that DoRA also uses. Checked with PEFT 0.21, where `_embed` and
`_get_embed_scale` of the embedding layer are private.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Embedding, LoraVariant, _ConvNd
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import linear

from scalora.model.shared_pass import add_in_one_pass, can_share, times
from scalora.rescale.moments import is_being_captured

if TYPE_CHECKING:
    from scalora.model.remainder_layer import RemainderLayer


class WithRemainder(LoraVariant):  # type: ignore[misc]
    """Plain LoRA plus the layer's factored remainder, which gets the input without dropout, like the base weight.

    Where there is no dropout, the two share one pair of matrix products.
    """

    def supports_lora_conversion(self) -> bool:
        """Whether PEFT may convert the adapter: yes, `RemainderLayer.get_delta_weight` is the whole update."""
        return True

    @staticmethod
    def forward(module: RemainderLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
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
        scaling = module.scaling[active_adapter]
        if isinstance(module, Embedding):
            lora_A, lora_B = module.lora_embedding_A[active_adapter], module.lora_embedding_B[active_adapter]
            update = (module._embed(x, lora_A.mT) @ lora_B.mT) * scaling
            if (scale := module._get_embed_scale()) is not None:
                update = update * scale.to(update.dtype)
            update = update + remainder_of_embedding(module, x)
        else:
            lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
            dropout = module.lora_dropout[active_adapter]
            if isinstance(module, _ConvNd):
                x = module.cast_as_peft(x, lora_A.weight.dtype)
                update = lora_B(lora_A(dropout(x))) * scaling
                if module.has_remainder:  # no convolution has no output channels
                    update = update + _remainder_of_convolution(module, lora_A, x)
            elif can_share(lora_A, lora_B, dropout, module.factored_remainder().columns, x):
                adapter, remainder = (lora_A.weight, lora_B.weight, scaling), factors_for_a_pass(module)
                return add_in_one_pass(result, x, adapter, (*remainder, module.remainder_scaling))
            else:
                x = module.cast_as_peft(x, lora_A.weight.dtype)
                update = lora_B(lora_A(dropout(x))) * scaling
                left, right = factors_for_a_pass(module)
                of_remainder = linear(linear(x, right.mT.to(x.dtype)), left.to(x.dtype))
                update = update + times(of_remainder, module.remainder_scaling)
        output: Tensor = result + update
        return output

    @staticmethod
    def merge_safe(module: RemainderLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """A copy of the (dequantised) base weight with the whole update added.

        Args:
            module: the PEFT layer.
            active_adapter: the adapter's name.
            orig_weight: the base weight, as stored; not modified.
        """
        merged: Tensor = orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)
        return merged

    @staticmethod
    def merge_unsafe(module: RemainderLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """Add the whole update to the base weight in place.

        Args:
            module: the PEFT layer.
            active_adapter: the adapter's name.
            orig_weight: the base weight, as stored; modified.
        """
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)


def _remainder_of_convolution(layer: RemainderLayer, lora_A: Any, x: Tensor) -> Tensor:
    """The output of a convolution's remainder alone: its right factor on the patches, its left one on the channels."""
    left, right = factors_for_a_pass(layer)
    kernels = right.mT.reshape(-1, *lora_A.weight.shape[1:]).to(x.dtype)
    hidden = functional_call(lora_A, {"weight": kernels}, x)
    channels = 1 - kernels.ndim  # a batch has a dimension more
    output = linear(hidden.movedim(channels, -1), left.to(x.dtype)).movedim(-1, channels)
    return times(output, layer.remainder_scaling)


def remainder_of_embedding(layer: RemainderLayer, ids: Tensor) -> Tensor:
    """The output of an embedding's remainder alone, (…, m).

    Args:
        layer: PEFT's embedding layer, with a factored remainder.
        ids: token ids, (…).
    """
    left, right = factors_for_a_pass(layer)
    output = layer._embed(ids, right) @ left.mT
    if (scale := layer._get_embed_scale()) is not None:
        output = output * scale.to(output.dtype)
    return times(output, layer.remainder_scaling)


def factors_for_a_pass(layer: RemainderLayer) -> tuple[Tensor, Tensor]:
    """The factors in their full width where another one would be compiled for, else the columns in use, for speed.

    What is captured in a CUDA graph goes on with the columns that it was captured with, so these have to be all.

    Args:
        layer: a layer with a factored remainder.
    """
    remainder = layer.factored_remainder()
    fixed = torch.compiler.is_compiling() or is_being_captured(remainder.left.device)
    return (remainder.left, remainder.right) if fixed else remainder.used
