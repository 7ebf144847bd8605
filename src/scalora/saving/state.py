"""The state that makes a trained model out of its base: gathering, checking and restoring it (paper, section 6)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from types import NoneType
from typing import Any, get_args

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from scalora.config import Merge, ScaLoraConfig
from scalora.model.adapters import LoraPair
from scalora.model.layers import factor_keys, plain_name
from scalora.model.placement import kind_of
from scalora.parallel.flat import Run
from scalora.parallel.shards import local, split_as
from scalora.parallel.zero import Zero, run_of_weight
from scalora.rescale.remainder import HALF, DenseRemainder, FactoredRemainder
from scalora.saving.errors import StateError, short_repr
from scalora.saving.fingerprint import difference
from scalora.saving.random_state import check_random_state

# The entries of every state, with their types.
_ENTRIES: dict[str, tuple[type, ...]] = {
    "base": (str,),
    "adapter": (dict, NoneType),
    "merge": (str,),
    "config": (dict, NoneType),
    "step": (int,),
    "rescales": (int,),
    "tensors": (dict,),
}


def gather(model: nn.Module, pairs: list[LoraPair], zero: Zero | None = None) -> dict[str, Any]:
    """All tensors that training changes, by name. They are not copied.

    Args:
        model: the model.
        pairs: its LoRA pairs, with remainders.
        zero: the optimizer of DeepSpeed's ZeRO that trains the model; None without.

    Returns:
        Tensors, or what this process has of them with ZeRO:

        ``trained.NAME`` for every parameter that has been trained (both factors, and heads or biases that are trained
        too), even if it is frozen now, and for the buffers of `modules_to_save`, such as running means.
        For each layer, ``weight.NAME`` if its remainder is merged into it, and ``rounded_off.NAME`` if it is dense and
        in half precision: int16, or int8 with 8 bits;
        ``left.NAME``, ``right.NAME`` and ``discarded.NAME`` if it is factored.
    """
    part = Tensor.detach if zero is None else zero.part_of
    tensors: dict[str, Any] = {f"trained.{name}": part(p) for name, p in _trained_parameters(model, pairs)}
    tensors |= {f"trained.{name}": buffer.detach() for name, buffer in _trained_buffers(model, pairs[0].adapter)}
    for pair in pairs:
        if isinstance(pair.remainder, DenseRemainder):
            tensors[f"weight.{pair.name}"] = part(pair.weight)
        tensors |= {f"{key}.{pair.name}": value for key, value in _kept_beside(pair).items()}
    return tensors


def _kept_beside(pair: LoraPair) -> dict[str, Any]:
    """The tensors of a layer's remainder, also those that are not in the state dicts of shards."""
    remainder = pair.remainder
    if isinstance(remainder, FactoredRemainder):
        return remainder.state_dict()
    if (low := remainder.rounded_off) is None:
        return {}
    run = run_of_weight(pair.weight)
    return {"rounded_off": low if run is None else run.of(low)}


def check_all(
    state: Mapping[str, Any],
    model: nn.Module,
    pairs: list[LoraPair],
    fingerprint: str,
    config: ScaLoraConfig,
    zero: Zero | None,
) -> None:
    """Check that a run can go on from a state, but for its optimizer's, which torch checks.

    Args:
        state: the state.
        model: the model.
        pairs: its LoRA pairs, with remainders.
        fingerprint: fingerprint of its base.
        config: the run's settings.
        zero: the optimizer of DeepSpeed's ZeRO that trains the model; None without.

    Raises:
        StateError: it can't.
    """
    check_content(state)
    check_base(state, fingerprint)
    check_config(state, config)
    check_merge(state, pairs)
    check_fit(model, pairs, state["tensors"], zero)
    check_base_rates(state, [pair.name for pair in pairs])
    if "random" in state:
        check_random_state(state["random"])


def check_content(state: Mapping[str, Any]) -> None:
    """Check that a state has all entries, of the right types.

    Args:
        state: the state, from memory or from a file.

    Raises:
        StateError: an entry is missing or invalid.
    """
    if missing := sorted(_ENTRIES.keys() - state.keys()):
        raise StateError(f"not a ScaLoRA state: it lacks {', '.join(missing)}")
    for key, types in _ENTRIES.items():
        value = state[key]
        if not isinstance(value, types):
            raise StateError(f"the state is damaged: its {key!r} is {short_repr(value)}")
        if isinstance(value, int) and (isinstance(value, bool) or value < 0):
            raise StateError(f"the state is damaged: its {key!r} is {value}, not a non-negative integer")
    kinds = [kind for kind in get_args(Merge) if kind != "auto"]
    if state["merge"] not in kinds:
        raise StateError(f"the state is damaged: its 'merge' is {state['merge']!r}, not one of {', '.join(kinds)}")
    for name, value in state["tensors"].items():
        if not isinstance(value, Tensor):
            raise StateError(f"the state is damaged: {name!r} is {short_repr(value)}, not a tensor")


def check_base(state: Mapping[str, Any], fingerprint: str) -> None:
    """Check that a state belongs to a base.

    Args:
        state: the state.
        fingerprint: fingerprint of the base, from `base_fingerprint`.

    Raises:
        StateError: the state belongs to another base.
    """
    if (different := difference(state["base"], fingerprint)) is not None:
        raise StateError(
            f"the state belongs to a base model with fingerprint {different[0]}, but this one has {different[1]}: load "
            "the base that the run started from, in the same dtype and quantisation, and adapt the same modules"
        )


def check_merge(state: Mapping[str, Any], pairs: list[LoraPair]) -> None:
    """Check that a state's remainders are of a model's kind.

    Args:
        state: the state.
        pairs: the LoRA pairs of the model, with remainders.

    Raises:
        StateError: they are of another kind.
    """
    if state["merge"] != (own := kind_of(pairs[0].remainder)):
        raise StateError(
            f"the state was saved with merge={state['merge']!r}, but this model has merge={own!r}: set "
            f"merge={state['merge']!r}"
        )


def check_base_rates(state: Mapping[str, Any], layers: Iterable[str]) -> None:
    """Check the base learning rates in a state, which earlier versions did not save.

    Args:
        state: the state.
        layers: the names of the model's adapted layers.

    Raises:
        StateError: they are not two numbers for each layer.
    """
    if (rates := state.get("base_rates")) is None:
        return
    for name in layers:
        of_layer = rates.get(name) if isinstance(rates, Mapping) else None
        if not isinstance(of_layer, (list, tuple)) or len(of_layer) != 2 or not all(map(_is_rate, of_layer)):
            raise StateError(f"the state is damaged: the base learning rates of {name!r} are {short_repr(of_layer)}")


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def check_config(state: Mapping[str, Any], config: ScaLoraConfig) -> None:
    """Check that a state was saved with a run's settings, if an engine was attached then.

    Args:
        state: the state.
        config: the run's settings.

    Raises:
        StateError: it was saved with others, or with some that this version does not accept.
    """
    saved = saved_config(state)
    if saved is not None and saved != config:
        raise StateError(f"the state was saved with {saved}, but this run has {config}: use the same settings")


def saved_config(state: Mapping[str, Any]) -> ScaLoraConfig | None:
    """The settings that a state was saved with.

    Args:
        state: the state.

    Returns:
        The settings; None if no engine was attached when the state was saved.

    Raises:
        StateError: this version of scalora does not accept the settings.
    """
    if state["config"] is None:
        return None
    try:
        return ScaLoraConfig.from_dict(state["config"])
    except (TypeError, ValueError) as error:
        raise StateError(f"the state's settings can't be used: {error}") from None


def check_fit(model: nn.Module, pairs: list[LoraPair], tensors: Mapping[str, Tensor], zero: Zero | None = None) -> None:
    """Check that the tensors of a state fit a model.

    Args:
        model: the model.
        pairs: its LoRA pairs, with remainders.
        tensors: the tensors, by the names of `gather`.
        zero: the optimizer of DeepSpeed's ZeRO that trains the model; None without.

    Raises:
        StateError: a tensor is missing, unknown, of another shape or dtype, or has NaN or infinite entries.
    """
    expected = gather(model, pairs, zero)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise StateError(
            f"the state lacks {missing[0]!r} ({len(missing)} missing): it belongs to another model or adapter"
        )
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise StateError(
            f"the state has {unknown[0]!r} ({len(unknown)} unknown), which the model lacks: it belongs to another "
            "adapter, or was saved with another merge setting"
        )
    for name, saved in tensors.items():
        wanted = expected[name]
        if name.startswith(("left.", "right.")):  # of any number of columns
            fits = saved.ndim == wanted.ndim and saved.shape[:-1] == wanted.shape[:-1]
        else:
            fits = saved.shape == wanted.shape
        # DeepSpeed trains copies in float32 of parameters in half precision.
        rounds = name.startswith("trained.") and saved.dtype == torch.float32 and wanted.dtype in HALF
        if not fits or (saved.dtype != wanted.dtype and not rounds):
            raise StateError(
                f"{name!r} is {saved.dtype} {tuple(saved.shape)} in the state, but {wanted.dtype} "
                f"{tuple(wanted.shape)} in the model"
            )
        if not local(saved).isfinite().all():
            raise StateError(f"{name!r} in the state has NaN or infinite entries")
    for pair in pairs:
        if (left := tensors.get(f"left.{pair.name}")) is not None and (
            left.shape[-1] != tensors[f"right.{pair.name}"].shape[-1]
        ):
            raise StateError(f"the factors of {pair.name!r} in the state have different numbers of columns")


def restore(model: nn.Module, pairs: list[LoraPair], tensors: Mapping[str, Tensor], zero: Zero | None = None) -> None:
    """Copy the tensors of a state into a model.

    Args:
        model: the model; modified.
        pairs: its LoRA pairs, with remainders.
        tensors: the tensors, by the names of `gather`; must have passed `check_fit`.
        zero: the optimizer of DeepSpeed's ZeRO that trains the model; None without.
    """
    with torch.no_grad():
        for pair in pairs:
            if isinstance(pair.remainder, FactoredRemainder):
                kept = {key: tensors[f"{key}.{pair.name}"] for key in _kept_beside(pair)}
                pair.remainder.load_state_dict(kept)
        for name, target in gather(model, pairs, zero).items():
            if isinstance(target, Run):
                target.put(tensors[name])
            elif not name.startswith(("left.", "right.", "discarded.")):
                target.copy_(split_as(tensors[name], target))
        for pair in pairs:
            pair.remainder.changed = pair.remainder.changed or isinstance(pair.remainder, DenseRemainder)
        if zero is not None:
            zero.refresh()
        pairs[0].layer.factor_guard.forget()


def _trained_parameters(model: nn.Module, pairs: list[LoraPair]) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that are or have been trained. PEFT freezes those of an adapter that is not active."""
    layer = pairs[0].layer
    own = {*layer.attachment.trained, *(key for pair in pairs for key in pair.keys)}
    others = {
        f"{pair.name}.{key}"
        for pair in pairs
        for other in pair.other_adapters
        for key in factor_keys(pair.layer, other)
    }
    for full_name, parameter in model.named_parameters():
        name = plain_name(full_name)
        if name in own or (parameter.requires_grad and name not in others):
            yield name, parameter


def _trained_buffers(model: nn.Module, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """The persistent buffers of the adapter's `modules_to_save`, as PEFT saves them."""
    for full_name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            saved = module.modules_to_save[adapter]
            buffers = dict(saved.named_buffers())
            for key in saved.state_dict().keys() & buffers.keys():
                yield plain_name(f"{full_name}.modules_to_save.{adapter}.{key}"), buffers[key]
