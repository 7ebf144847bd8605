"""Finds the PeftModel that a user's model is, holds or is held by.

Training loops hand over what they have: the PeftModel, a wrapper around it (`torch.compile`, Lightning Fabric, the
user's own module), or the base model inside it. What is saved, and under which names, must not depend on that.
"""

from __future__ import annotations

import gc

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from scalora.model.adapters import UnsupportedLayerError


def peft_model_of(model: nn.Module) -> PeftModel | None:
    """The PeftModel whose LoRA layers a model has.

    Args:
        model: the PeftModel, a module that contains it, or the base model inside it.

    Returns:
        The PeftModel; None if PEFT has injected layers without one (Transformers' ``add_adapter``,
        ``peft.inject_adapter_in_model``).

    Raises:
        UnsupportedLayerError: there is more than one.
    """
    inside = [m for m in model.modules() if isinstance(m, PeftModel) and _has_lora(m)]
    if len(inside) > 1:
        raise UnsupportedLayerError(
            f"{type(model).__name__} contains {len(inside)} PeftModels with LoRA layers: attach ScaLoRA to the one "
            "that is trained"
        )
    if inside:
        return inside[0]
    # PEFT's tuner leaves its configurations at the base model, but no way back to the PeftModel.
    return _holder(model) if hasattr(model, "peft_config") else None


def injected_models(model: nn.Module) -> list[nn.Module]:
    """The modules that PEFT has injected layers into without a PeftModel, and left its configurations at.

    Args:
        model: a module that is one of them, or contains them.
    """
    return [module for module in model.modules() if "peft_config" in vars(module)]


def root_of(model: nn.Module) -> nn.Module:
    """The model under whose names a state is kept: a wrapper that adds no parameters is left out.

    Args:
        model: the model that ScaLoRA is attached to.

    Raises:
        UnsupportedLayerError: it contains more than one PeftModel.
    """
    peft_model = peft_model_of(model)
    if peft_model is None:
        return model
    own = {id(parameter) for parameter in peft_model.parameters()}
    return peft_model if all(id(parameter) in own for parameter in model.parameters()) else model


def _has_lora(model: nn.Module) -> bool:
    return any(isinstance(module, LoraLayer) for module in model.modules())


def _holder(base: nn.Module) -> PeftModel | None:
    # By type and not with isinstance, which would load what lazy modules stand for.
    holders = (o for o in gc.get_objects() if issubclass(type(o), PeftModel))
    return next((m for m in holders if any(module is base for module in m.modules())), None)
