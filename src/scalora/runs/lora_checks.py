"""Checks the settings under ``lora:`` against a model: what names nothing in it would be ignored without a word.

PEFT raises only if nothing at all matches, and merges a bias only at the end. Its rules for names are those of 0.21:
`check_target_module_exists`, `_set_trainable` and `get_pattern_key`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from scalora.model.layers import whole_shape
from scalora.runs.errors import InputError
from scalora.runs.prepare import PreparedRun

_ALL_LINEAR = "all-linear"


def check_names(run: PreparedRun, base: nn.Module) -> None:
    """Check that every name of a module or parameter is in the model, and every pattern one, before it is adapted.

    Args:
        run: the run.
        base: the base model.

    Raises:
        InputError: a setting names nothing in the model; names the setting and a near name.
    """
    lora = _settings(run)
    modules = [name for name, _ in base.named_modules(remove_duplicate=False) if name]
    parameters = [name for name, _ in base.named_parameters()]
    for key in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        value = lora.get(key)
        known, kind = (parameters, "parameter") if key == "target_parameters" else (modules, "module")
        if isinstance(value, str) and value.lower() != _ALL_LINEAR:
            _check_pattern(key, value, known)
        for name in value if isinstance(value, list) else ():
            if not any(_ends_with(full, name) for full in known):
                raise InputError(f"lora.{key}: the model has no {kind} {name!r}{_near(name, known)}")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in lora.get(key) or ():
            _compiled(key, pattern)
    for name in lora.get("modules_to_save") or ():
        if more := [full for full in modules if full.endswith(name) and not _ends_with(full, name)]:
            whole = next(full for full in modules if _ends_with(full, name))
            hint = f"; write the whole name, such as {whole!r}" if whole != name else ""
            raise InputError(f"lora.modules_to_save: {name!r} would take in {more[0]!r} too{hint}")
    _check_tokens(base, lora.get("trainable_token_indices"), modules)


def check_adapted(run: PreparedRun, model: nn.Module) -> None:
    """Check the settings that single out adapted modules, and the biases, after the model was adapted.

    Args:
        run: the run.
        model: the adapted model.

    Raises:
        InputError: a setting matches no adapted module, or a module has no bias to train.
    """
    lora = _settings(run)
    tuner = getattr(model, "base_model", None)
    adapted: list[str] = [*getattr(tuner, "targeted_module_names", ()), *getattr(tuner, "targeted_parameter_names", ())]
    if not adapted:
        return
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in lora.get(key) or ():
            if not any(_compiled(key, rf"(.*\.)?({pattern})$").match(name) for name in adapted):
                raise InputError(f"lora.{key}: {pattern!r} matches no adapted module{_near(pattern, adapted)}")
    layers = lora.get("layers_to_transform")
    for layer in layers if isinstance(layers, list) else [] if layers is None else [layers]:
        if not any(f".{layer}." in name for name in adapted):
            raise InputError(f"lora.layers_to_transform={layers!r}: there is no layer {layer} with adapted modules")
    if lora.get("lora_bias"):
        _require_biases(model, adapted)


def _settings(run: PreparedRun) -> Mapping[str, Any]:
    """The section ``lora`` of the config, which has no effect on a method without an adapter."""
    return {} if run.peft_config is None else run.settings.lora


def _require_biases(model: nn.Module, adapted: Iterable[str]) -> None:
    for name in adapted:
        layer = model.get_base_model().get_submodule(name)  # type: ignore[operator]
        if getattr(getattr(layer, "base_layer", layer), "bias", None) is None:
            raise InputError(
                f"lora.lora_bias=True: module {name!r} has no bias, and what is trained could not be merged; leave "
                "lora_bias out, or the module out of target_modules"
            )


def _check_pattern(key: str, pattern: str, names: Iterable[str]) -> None:
    compiled = _compiled(key, pattern)
    if not any(compiled.fullmatch(name) for name in names):
        raise InputError(
            f"lora.{key}={pattern!r}: a text is a regular expression for whole names, and it matches none; write a "
            f"list, such as [{pattern}], for names"
        )


def _check_tokens(base: nn.Module, tokens: Any, modules: Sequence[str]) -> None:
    """Check that token indices are within the vocabulary, and that the embeddings they are listed under exist."""
    for name, indices in tokens.items() if isinstance(tokens, dict) else [("", tokens or [])]:
        full = next((module for module in modules if _ends_with(module, name)), None) if name else None
        if name and full is None:
            raise InputError(f"lora.trainable_token_indices: the model has no module {name!r}{_near(name, modules)}")
        layer: Any = base.get_submodule(full) if full else base.get_input_embeddings()  # type: ignore[operator]
        size = whole_shape(layer.weight)[0]
        if beyond := [index for index in indices if index >= size]:
            raise InputError(
                f"lora.trainable_token_indices: there is no token {beyond[0]}: the vocabulary has {size:,}"
            )


def _compiled(key: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"lora.{key}={pattern!r}: not a regular expression: {error}") from None


def _ends_with(full: str, name: str) -> bool:
    return full == name or full.endswith(f".{name}")


def _near(name: str, known: Iterable[str]) -> str:
    """What may have been meant instead."""
    names = list(known)
    near = difflib.get_close_matches(name, [*{full.rpartition(".")[2] for full in names}, *names], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
