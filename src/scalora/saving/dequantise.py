"""Turns the layers of a quantised model into ordinary ones with the weights that they stand for.

Transformers does it for bitsandbytes. Checked with torchao 0.18, HQQ 0.2.8 and GPTQModel 7.7, none of which is
imported: their layers are known by what they can do.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


def dequantised(model: PreTrainedModel) -> PreTrainedModel:
    """The model with ordinary weights.

    Args:
        model: a quantised model without adapters; modified.

    Returns:
        The model. Its layers compute what they did, up to rounding, except for those that also quantise their inputs.

    Raises:
        NotImplementedError: Transformers does not say how, for a kind of layer that is not known here either.
    """
    weights = ((name, module, _weight(module)) for name, module in model.named_modules())
    found = [(name, module, weight) for name, module, weight in weights if weight is not None]
    if not found:
        whole: PreTrainedModel = model.dequantize()
        return whole
    for name, module, weight in found:
        outputs, inputs = weight.shape
        bias: Tensor | None = getattr(module, "bias", None)
        linear = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
        model.set_submodule(name, linear)
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    return model


def _weight(module: Any) -> Tensor | None:
    """The (m, n) that a quantised layer stands for; None of other modules."""
    weight: Tensor | None = None
    if isinstance(module, nn.Linear) and hasattr(module.weight, "__tensor_flatten__"):  # torchao
        packed: Any = module.weight
        weight = packed.detach().dequantize()
    elif hasattr(module, "W_q"):  # HQQ
        weight = module.dequantize().detach()
    elif hasattr(module, "dequantize_weight"):  # GPTQModel
        weight = module.dequantize_weight().detach().T.contiguous()
    return weight
