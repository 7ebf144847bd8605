"""Finds the LoRA pairs of a PEFT model, in the paper's orientation. All knowledge of PEFT's layers is in this file."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_HALF = (torch.float16, torch.bfloat16)


class UnsupportedLayerError(ValueError):
    """A module that ScaLoRA can't treat; the message names it and says the way out."""


@dataclass(frozen=True, eq=False)
class LoraPair:
    """One adapted layer: ``W + s·A·Bᵀ``.

    Attributes:
        name: the module's name in the model.
        lora_A: PEFT's parameter (r, n): the paper's Bᵀ.
        lora_B: PEFT's parameter (m, r): the paper's A.
        weight: the frozen base weight, (m, n), or (n, m) when `transposed`.
        transposed: whether the base stores its weight transposed (Conv1D, embeddings).
        layer: the PEFT layer; its scaling is read at each step because PEFT lets users change it.
        adapter: the adapter's name.
    """

    name: str
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    weight: nn.Parameter
    transposed: bool
    layer: LoraLayer
    adapter: str

    @property
    def scaling(self) -> float:
        """s: alpha/r, or alpha/√r with rsLoRA."""
        return float(self.layer.scaling[self.adapter])

    @property
    def group_key(self) -> tuple[Any, ...]:
        """Layers with equal keys can be stacked and solved together."""
        return (*self.lora_B.shape, self.lora_A.shape[1], self.lora_B.dtype, self.lora_B.device)


def find_lora_pairs(model: nn.Module) -> list[LoraPair]:
    """All LoRA pairs of a model, each checked.

    Args:
        model: a `PeftModel`, or any module with PEFT LoRA layers injected.

    Raises:
        UnsupportedLayerError: there is no LoRA layer, or one that can't be treated: DoRA and other variants,
            convolutions, attention modules, quantised or tied base weights, half-precision, frozen or tied adapter
            weights, merged or disabled adapters, more adapters than the one that is active.
    """
    owners = _owners_of_parameters(model)
    pairs = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            pairs.append(_checked_pair(name, module, owners))
        elif isinstance(module, BaseTunerLayer):
            _refuse(name, f"{type(module).__name__} is not a LoRA layer", "adapt the model with LoraConfig")
    if not pairs:
        raise UnsupportedLayerError(
            "the model has no LoRA layers: wrap it with peft.get_peft_model(model, LoraConfig(...)) first"
        )
    return pairs


def _owners_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Names under which each parameter is reachable, by the parameter's id: more than one means tied."""
    owners = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    return owners


def _checked_pair(name: str, layer: LoraLayer, owners: dict[int, list[str]]) -> LoraPair:
    adapters = layer.active_adapters
    if len(adapters) != 1:
        _refuse(name, f"{len(adapters)} active adapters ({', '.join(adapters) or 'none'})", "activate exactly one")
    adapter = adapters[0]
    if others := sorted({*layer.lora_A, *layer.lora_embedding_A} - {adapter}):
        _refuse(
            name,
            f"it also holds adapter {others[0]!r}, which would be wrong once the base weight has changed",
            f"call delete_adapter({others[0]!r}); to a trainer that keeps a reference (DPO, KTO, GRPO) pass ref_model",
        )
    if layer.merged:
        _refuse(name, "its adapter is merged", "call unmerge_adapter() first")
    if layer.disable_adapters:
        _refuse(name, "its adapter is disabled", "call enable_adapter_layers() first")
    if layer.use_dora.get(adapter):
        _refuse(name, "DoRA's magnitude makes the update non-linear in A and B", "set use_dora=False")
    if adapter in getattr(layer, "lora_variant", {}):
        variant = type(layer.lora_variant[adapter]).__name__
        _refuse(name, f"the LoRA variant {variant} changes the update", "use plain LoRA")
    base = layer.get_base_layer()
    if type(layer) not in (Linear, Embedding) or not isinstance(base, (nn.Linear, Conv1D, nn.Embedding)):
        _refuse(
            name,
            f"{type(layer).__name__} over {type(base).__name__} is not a linear, Conv1D or embedding layer",
            "leave it out of target_modules",
        )
    weight = base.weight
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        _refuse(
            name,
            f"its base weight is quantised ({type(weight).__name__}, {weight.dtype})",
            "load the base model in float32 or bfloat16",
        )
    if len(names := owners[id(weight)]) > 1:
        _refuse(
            name,
            f"its base weight is tied ({' = '.join(names)})",
            "leave it out of target_modules, or untie it",
        )
    if isinstance(layer, Embedding):
        lora_A, lora_B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        transposed = True
    else:
        lora_A, lora_B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        transposed = bool(layer.fan_in_fan_out)
    for key, parameter in (("lora_A", lora_A), ("lora_B", lora_B)):
        if not parameter.requires_grad:
            _refuse(name, f"{key} is frozen", "ScaLoRA trains both factors: set requires_grad=True")
        if parameter.dtype in _HALF:
            _refuse(
                name,
                f"{key} is {parameter.dtype}, whose rounding a rescale would multiply",
                "keep the adapter in float32 (PEFT's autocast_adapter_dtype=True)",
            )
        if len(names := owners[id(parameter)]) > 1:
            _refuse(name, f"{key} is tied ({' = '.join(names)})", "use one adapter for each layer")
    return LoraPair(name, lora_A, lora_B, weight, transposed, layer, adapter)


def _refuse(name: str, why: str, way_out: str) -> None:
    raise UnsupportedLayerError(f"ScaLoRA can't treat module {name!r}: {why}; {way_out}")


def stack(tensors: list[Tensor]) -> Tensor:
    """Stack detached tensors of one shape along a new first dimension."""
    return torch.stack([tensor.detach() for tensor in tensors])
