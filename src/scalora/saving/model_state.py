"""The state of a model with ScaLoRA attached, without an optimizer: what `save_pretrained` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import nn

from scalora.model.adapters import LoraPair
from scalora.model.attachment import Attachment
from scalora.model.placement import kind_of
from scalora.model.remainder_layer import ChangedBaseError
from scalora.parallel.zero import Zero
from scalora.saving.loading import loading_of
from scalora.saving.state import (
    check_base,
    check_content,
    check_fit,
    check_merge,
    gather,
    restore,
)
from scalora.saving.state_file import read_state


def state_of(model: nn.Module, pairs: list[LoraPair], zero: Zero | None = None) -> dict[str, Any]:
    """The state of a model with ScaLoRA attached: every trained tensor, and which base they belong to.

    Args:
        model: the model.
        pairs: its LoRA pairs, with remainders.
        zero: the optimizer of DeepSpeed's ZeRO that trains the model; None without, or for the model's own parameters.

    Returns:
        A tree of dicts, numbers, strings and tensors, which are not copied.

    Raises:
        ChangedBaseError: the adapter is merged into a base that ScaLoRA has changed.
        ChangedFactorsError: something other than an optimizer has overwritten the factors.
    """
    layer = pairs[0].layer
    merge = kind_of(pairs[0].remainder)
    if merge != "factored" and any(pair.layer.merged for pair in pairs):
        raise ChangedBaseError(
            "the adapter is merged into the base weights, which are part of what is saved: call unmerge_adapter() first"
        )
    if layer.has_remainder:
        layer.factor_guard.check()
    attachment: Attachment = layer.attachment
    adapter = getattr(model, "peft_config", {}).get(pairs[0].adapter)
    return {
        "base": attachment.fingerprint,
        "adapter": json.loads(json.dumps(LoraConfig.to_dict(adapter), default=_plain)) if adapter is not None else None,
        "loading": loading_of(model),
        "merge": merge,
        "config": attachment.config.to_dict() if attachment.config else None,
        "step": attachment.step,
        "rescales": attachment.rescales,
        "base_rates": attachment.base_rates,
        "tensors": _exact(gather(model, pairs, zero), pairs),
    }


def load_into(model: nn.Module, pairs: list[LoraPair], folder: Path) -> None:
    """Restore a saved state into a model with ScaLoRA attached, without an optimizer.

    Args:
        model: the model; modified.
        pairs: its LoRA pairs, with remainders.
        folder: the folder with the state.

    Raises:
        StateError: the state is damaged, or of another base model or adapter. The model has not been changed then.
    """
    state = read_state(folder)
    attachment: Attachment = pairs[0].layer.attachment
    check_content(state)
    check_base(state, attachment.fingerprint)
    check_merge(state, pairs)
    check_fit(model, pairs, state["tensors"])
    restore(model, pairs, state["tensors"])
    attachment.restart(step=state["step"], rescales=state["rescales"])


def _exact(tensors: dict[str, Any], pairs: list[LoraPair]) -> dict[str, Any]:
    """Tensors of a state with factors in the dtype that they are trained in, of which the model may have copies."""
    dtypes = {f"trained.{key}": pair.dtype for pair in pairs for key in pair.keys}
    return {
        name: tensor.to(dtypes[name]) if name in dtypes and tensor.dtype != dtypes[name] else tensor
        for name, tensor in tensors.items()
    }


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else getattr(value, "value", str(value))
