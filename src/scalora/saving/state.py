"""What makes a trained model out of its base: gathered, tied to that base, checked, put back exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from scalora.config import ScaLoraConfig
from scalora.model.adapters import LoraPair
from scalora.rescale.remainder import DenseRemainder
from scalora.saving.errors import StateError, short_repr

# What every state holds, and of which types.
_ENTRIES: dict[str, tuple[type, ...]] = {
    "base": (str,),
    "adapter": (dict, NoneType),
    "merge": (str,),
    "config": (dict, NoneType),
    "step": (int,),
    "rescales": (int,),
    "tensors": (dict,),
}

# Entries of each weight that the fingerprint looks at, spread evenly: any training step changes nearly all entries, so
# a few of each are enough to tell two models apart, at no cost even for the largest.
_SAMPLES = 64


def base_fingerprint(model: nn.Module) -> str:
    """Identifies what is frozen under a PEFT model: a SHA-256 over a sample of each tensor, its name, shape and dtype.

    Take it before the first change to the base. Trained parameters and what PEFT put beside them do not count.
    """
    # The tensors of the state dict and not the parameters themselves: bitsandbytes keeps a 4-bit weight in another
    # layout once a CPU has used it for inference.
    tensors = model.state_dict()
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        # PEFT keeps the head that it trains a copy of; a new head is random and differs from one load to the next.
        if parameter.requires_grad or ".original_module." in name:
            continue
        tensor = tensors[name]
        flat = tensor.reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].contiguous().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def gather(model: nn.Module, pairs: list[LoraPair]) -> dict[str, Tensor]:
    """All tensors that training changes, by name, not copied.

    ``trained.NAME`` for every trained parameter (both factors, and heads or biases trained beside them), and for each
    layer its remainder: ``weight.NAME`` (and ``rounded_off.NAME``) where it is dense, ``left.NAME`` and ``right.NAME``
    where it is factored.
    """
    tensors = {f"trained.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for pair in pairs:
        if isinstance(pair.remainder, DenseRemainder):
            tensors[f"weight.{pair.name}"] = pair.weight.detach()
        tensors |= {f"{key}.{pair.name}": value for key, value in pair.remainder.state_dict().items()}
    return tensors


def check_content(state: Mapping[str, Any]) -> None:
    """See to it that a state has what every state has.

    Raises:
        StateError: an entry is missing, or is not what it should be.
    """
    if missing := sorted(_ENTRIES.keys() - state.keys()):
        raise StateError(f"not a ScaLoRA state: it lacks {', '.join(missing)}")
    for key, types in _ENTRIES.items():
        value = state[key]
        if not isinstance(value, types):
            raise StateError(f"the state is damaged: its {key!r} is {short_repr(value)}")
        if isinstance(value, int) and (isinstance(value, bool) or value < 0):
            raise StateError(f"the state is damaged: its {key!r} is {value}, not a count")
    if state["merge"] not in ("dense", "factored"):
        raise StateError(f"the state is damaged: its 'merge' is {state['merge']!r}, neither 'dense' nor 'factored'")
    for name, value in state["tensors"].items():
        if not isinstance(value, Tensor):
            raise StateError(f"the state is damaged: {name!r} is {short_repr(value)}, not a tensor")


def check_base(state: Mapping[str, Any], fingerprint: str) -> None:
    """Raise `StateError` if a state belongs to another base than that with the fingerprint."""
    if state["base"] != fingerprint:
        raise StateError(
            f"the state belongs to a base model with fingerprint {state['base'][:12]}, this one has "
            f"{fingerprint[:12]}: load the base that the run started from, in the same dtype, and adapt "
            "the same modules of it"
        )


def saved_config(state: Mapping[str, Any]) -> ScaLoraConfig | None:
    """The settings that a state was saved with; None if it was saved before an engine was attached.

    Raises:
        StateError: they are not settings of this scalora.
    """
    if state["config"] is None:
        return None
    try:
        return ScaLoraConfig.from_dict(state["config"])
    except (TypeError, ValueError) as error:
        raise StateError(f"the state's settings can't be used: {error}") from None


def check_fit(model: nn.Module, pairs: list[LoraPair], tensors: Mapping[str, Tensor]) -> None:
    """See to it that gathered tensors can be put back in a model.

    Raises:
        StateError: a tensor is missing, unknown, of another shape or dtype, or not finite.
    """
    expected = gather(model, pairs)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise StateError(f"the state lacks {missing[0]!r} ({len(missing)} missing): it is of another model or adapter")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise StateError(
            f"the state has {unknown[0]!r} ({len(unknown)} unknown), which the model has not: it is of another "
            "adapter, or of another merge setting"
        )
    for name, saved in tensors.items():
        wanted = expected[name]
        if name.startswith(("left.", "right.")):  # with as many columns as there were
            fits = saved.ndim == 2 and len(saved) == len(wanted)
        else:
            fits = saved.shape == wanted.shape
        if not fits or saved.dtype != wanted.dtype:
            raise StateError(
                f"{name!r} is {saved.dtype} {tuple(saved.shape)} in the state and {wanted.dtype} "
                f"{tuple(wanted.shape)} in the model"
            )
        if not saved.isfinite().all():
            raise StateError(f"{name!r} in the state has NaN or infinite entries")
    for pair in pairs:
        if (left := tensors.get(f"left.{pair.name}")) is not None and (
            left.shape[1] != tensors[f"right.{pair.name}"].shape[1]
        ):
            raise StateError(f"the factors of {pair.name!r} have different numbers of columns")


def restore(model: nn.Module, pairs: list[LoraPair], tensors: Mapping[str, Tensor]) -> None:
    """Put gathered tensors, of which `check_fit` has found nothing, back in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(tensors[f"trained.{name}"])
        for pair in pairs:
            if isinstance(pair.remainder, DenseRemainder):
                pair.weight.copy_(tensors[f"weight.{pair.name}"])
            keys = pair.remainder.state_dict().keys()
            pair.remainder.load_state_dict({key: tensors[f"{key}.{pair.name}"] for key in keys})
