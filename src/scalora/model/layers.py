"""The types of layers that can be adapted, and where PEFT's LoRA layers keep what an adapter consists of."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, ParamWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Checked with torch 2.13.
_AROUND = re.compile(r"(^|\.)(_checkpoint_wrapped_module|_orig_mod)(?=\.|$)")

LINEAR = (nn.Linear, Conv1D)
"""Linear layers. Conv1D (GPT-2) stores its weight transposed."""

ADAPTABLE = (*LINEAR, nn.Embedding)
"""Layers whose update is ``s·A·Bᵀ``. An embedding stores its weight transposed."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose update is ``s·A·Bᵀ`` if their weight is taken for a matrix (`scalora.model.matrices`)."""

# Checked with PEFT 0.21. The factored remainder needs a forward pass that calls a `LoraVariant`: those of bitsandbytes,
# GPTQ, HQQ and torchao layers do, those of AWQ, EETQ and AQLM layers do not.
QUANTISED = ("Linear4bit", "Linear8bitLt", "GPTQLoraLinear", "HqqLoraLinear", "TorchaoLoraLinear")
"""Class names of PEFT's LoRA layers over quantised weights that are supported."""


def factor_keys(layer: LoraLayer, adapter: str) -> tuple[str, str]:
    """The names of an adapter's lora_A and lora_B in a layer.

    Args:
        layer: the PEFT layer.
        adapter: the adapter's name.
    """
    if adapter in layer.lora_embedding_A:
        return f"lora_embedding_A.{adapter}", f"lora_embedding_B.{adapter}"
    key = "factor" if has_signs(layer, adapter) else "weight"
    return f"lora_A.{adapter}.{key}", f"lora_B.{adapter}.{key}"


def has_signs(layer: LoraLayer, adapter: str) -> bool:
    """Whether an adapter's update has block signs (`scalora.model.signed_factors`), so that it trains other factors.

    Args:
        layer: the PEFT layer.
        adapter: the adapter's name.
    """
    return "factor" in getattr(layer._modules["lora_A"]._modules.get(adapter), "_parameters", ())


def factors_of(layer: LoraLayer, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """PEFT's lora_A, (r, n), and lora_B, (m, r), of an adapter: what is trained of them.

    Args:
        layer: the PEFT layer.
        adapter: the adapter's name.
    """
    # Asked of all layers in every rescale, so without the calls that the attributes of modules take.
    submodules = layer._modules
    of_A, of_B = submodules["lora_A"]._modules.get(adapter), submodules["lora_B"]._modules.get(adapter)
    if of_A is None or of_B is None:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    weight_A, weight_B = of_A._parameters.get("weight"), of_B._parameters.get("weight")
    if weight_A is None and has_signs(layer, adapter):
        return of_A.factor, of_B.factor
    return of_A.weight if weight_A is None else weight_A, of_B.weight if weight_B is None else weight_B


def configured_scaling(layer: LoraLayer, adapter: str) -> float:
    """The scaling of an adapter as it was configured: ``lora_alpha / r``, or ``lora_alpha / √r`` with rsLoRA.

    Args:
        layer: the PEFT layer.
        adapter: the adapter's name.
    """
    r = layer.r[adapter]
    return float(layer.lora_alpha[adapter] / (math.sqrt(r) if layer.use_rslora.get(adapter, False) else r))


def stored_transposed(layer: LoraLayer) -> bool:
    """Whether a layer's base weight is stored (n, m); that of experts, (E, n, m).

    Args:
        layer: the PEFT layer.
    """
    if isinstance(layer, ParamWrapper):  # checked with PEFT 0.21
        return bool(layer._param_ndim == 3 and not layer._did_swap_in_out_features)
    return isinstance(layer, Embedding) or bool(getattr(layer, "fan_in_fan_out", False))


def weight_key(layer: LoraLayer) -> str:
    """The name of the parameter of a layer's base layer that is adapted.

    Args:
        layer: the PEFT layer.
    """
    return str(layer.parameter_name) if isinstance(layer, ParamWrapper) else "weight"


def experts_of(layer: LoraLayer) -> int:
    """The number of matrices that a layer's base weight is a stack of: a mixture's experts; 1 for one matrix.

    Args:
        layer: the PEFT layer.
    """
    return int(layer.num_experts) if isinstance(layer, ParamWrapper) else 1


def pattern_key(name: str, layer: LoraLayer) -> str:
    """What PEFT matches the keys of ``rank_pattern`` and ``alpha_pattern`` with.

    Args:
        name: the layer's name in the base model.
        layer: the PEFT layer.
    """
    # Layers of parameters are nested, one around the other, and PEFT knows them by their parameters' names.
    return f"{name.replace('.base_layer', '')}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else name


def pattern_of(key: str, keys: Iterable[str]) -> str:
    """A pattern of PEFT's for one layer and no other: without ``^`` it matches all names that end in it.

    Args:
        key: the layer's `pattern_key`.
        keys: those of all layers.
    """
    return f"^{key}" if any(other.endswith(f".{key}") for other in keys) else key


def plain_name(name: str) -> str:
    """A name in a model without what activation checkpointing and compilation put around modules.

    Args:
        name: name of a module or parameter.
    """
    return _AROUND.sub("", name).removeprefix(".")


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor of torch.distributed, which is not imported for this.

    Args:
        tensor: any tensor.
    """
    return hasattr(tensor, "device_mesh")


def is_partitioned(tensor: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 has taken a parameter apart, so that it is empty but where it is used.

    Args:
        tensor: any tensor.
    """
    return hasattr(tensor, "ds_shape")


def is_copy(tensor: Tensor) -> bool:
    """Whether a parameter is a copy that DeepSpeed's ZeRO-1 or ZeRO-2 overwrites with what its optimizer steps.

    Args:
        tensor: any tensor.
    """
    return getattr(tensor, "_hp_mapping", None) is not None


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of a tensor, also of one that ZeRO-3 has left empty (`scalora.parallel.zero` knows where it is).

    Args:
        tensor: any tensor.
    """
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape
