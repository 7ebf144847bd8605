"""How the base of a model was loaded: what a state records so that the same base can be loaded again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel


def loading_of(model: nn.Module) -> dict[str, Any] | None:
    """The class, dtypes, quantisation and classes of a model's base, as plain data.

    Args:
        model: a model with PEFT layers.

    Returns:
        ``"class"``, the name of the base's class; ``"dtype"``, the dtype that it was loaded in; ``"dtypes"``, those of
        the frozen parameters that have another one; ``"quantization"``, the configuration with which it was quantised
        while it was loaded, or None; ``"head"``, what the config says of the classes, or None. None for a base that is
        no model of Transformers.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        return None
    dtype = getattr(base.config, "dtype", None) or base.dtype
    quantizer = getattr(base, "hf_quantizer", None)
    quantization = None
    if quantizer is not None and not quantizer.pre_quantized:
        quantization = json.loads(json.dumps(quantizer.quantization_config.to_dict(), default=_plain))
    head = {key: getattr(base.config, key) for key in ("num_labels", "id2label", "label2id", "problem_type")}
    return {
        "class": type(base).__name__,
        "dtype": _name(dtype),
        "dtypes": {name: _name(p.dtype) for name, p in _frozen(base) if p.dtype != dtype},
        "quantization": quantization,
        "head": json.loads(json.dumps(head)) if "ForSequenceClassification" in type(base).__name__ else None,
    }


def convert_as(base: PreTrainedModel, dtypes: dict[str, str]) -> None:
    """Give the parameters of a base the dtypes that they had in training, such as those of norms in float32.

    Args:
        base: the base, as it was loaded; modified.
        dtypes: names of dtypes by names of parameters, from `loading_of`.
    """
    for name, parameter in base.named_parameters():
        if (wanted := dtypes.get(name)) is not None:
            parameter.data = parameter.data.to(getattr(torch, wanted))


def _frozen(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The frozen parameters in floating point, by the names that they have without PEFT's layers around them."""
    for name, parameter in base.named_parameters():
        if not parameter.requires_grad and parameter.is_floating_point() and ".lora_" not in name:
            yield name.replace(".base_layer.", ".").replace(".original_module.", "."), parameter


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(value: Any) -> Any:
    return _name(value) if isinstance(value, torch.dtype) else str(value)
