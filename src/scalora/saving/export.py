"""Makes a live model, an ordinary adapter or a merged model from a saved state and its base (paper, section 6).

Only one whole model is in memory at a time: the base, into which the state is read layer by layer.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from scalora.config import ScaLoraConfig, changes_the_base
from scalora.maths.lowrank import DEFAULT_RTOL, Factors, factors_of_dense
from scalora.model.adapters import LoraPair
from scalora.model.layers import weight_key
from scalora.model.update import dense_update, factored_update
from scalora.rescale.remainder import DenseRemainder
from scalora.saving.attach import attach
from scalora.saving.base_name import BaseName, base_name, flaw_of_name, loadable_name, write_base_name
from scalora.saving.dequantise import dequantised
from scalora.saving.errors import StateError
from scalora.saving.files import atomic_folder
from scalora.saving.merged_model import DEFAULT_SHARD_SIZE, write_model
from scalora.saving.ordinary_adapter import AdapterReport, write_factors
from scalora.saving.state import check_base, check_content, check_fit, restore, saved_config
from scalora.saving.state_file import read_state
from scalora.saving.verify import adapter_errors, check_model
from scalora.saving.vllm import vllm_objections

# An export warns if rounding to its dtype loses more than this share of a layer's update: it shows in the loss then.
_LOSES_MUCH = 0.1

# Where PEFT has an adapter's name in the names of its tensors.
_HOLDERS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "modules_to_save", "trainable_tokens_delta")
_ADAPTER_IN_NAME = re.compile(r"\.lora_(?:embedding_)?A\.([^.]+)")


def load_model(base: PreTrainedModel, folder: str | Path) -> PeftModel:
    """Load a saved state into its base, to use the model or to attach `scalora.ScaLora` and continue training.

    Args:
        base: the model that the run started from, in the dtype and quantisation of the run; modified.
        folder: a folder with a ``scalora_state.safetensors``.

    Returns:
        The trained model.

    Raises:
        StateError: the state is missing or damaged, or belongs to another base.
    """
    state = read_state(Path(folder))
    model, pairs = _wrap(base, state)
    restore(model, pairs, state["tensors"])
    return model


def export_adapter(
    base: PreTrainedModel,
    folder: str | Path,
    output: str | Path,
    *,
    rtol: float = DEFAULT_RTOL,
    max_rank: int | None = None,
    per_layer: bool = False,
    dtype: torch.dtype = torch.float32,
    name: str | None = None,
) -> tuple[PeftModel, AdapterReport]:
    """Write the whole update of a saved state as an ordinary LoRA adapter, which PEFT loads without scalora.

    The update is factored layer by layer: from the factors of a factored remainder, or by a randomised SVD of the
    difference from the base.

    Args:
        base: the model that the run started from, in the dtype and quantisation of the run; modified.
        folder: a folder with a ``scalora_state.safetensors``.
        output: the adapter's folder; must be empty or not exist.
        rtol: the largest error allowed in each layer, relative to the Frobenius norm of its update.
        max_rank: the largest rank allowed, even if errors then exceed `rtol`. None: no limit.
        per_layer: whether each layer has its own rank (PEFT's ``rank_pattern``). By default all have the largest one.
        dtype: dtype of the adapter's tensors.
        name: what the adapter names as its base. None: where `base` was loaded from, if others can load it from there.

    Returns:
        The trained model (the base with the state loaded into it), and a report of the adapter's ranks and errors,
        which are measured on the file, and of what vLLM does not take of it. Warns if the adapter names no base that
        will be there tomorrow.

    Raises:
        StateError: the state is missing or damaged, or belongs to another base.
        ExportError: what was written is not the update of every layer, or lacks something that was trained. The files
            have been removed.
        OSError: `output` is not empty, or can't be written to.
    """
    _require_unused(Path(output))
    state = read_state(Path(folder))
    model, pairs = _wrap(base, state)
    limit = max_rank or max(max(pair.m, pair.n) for pair in pairs)
    updates: dict[str, list[Factors]] = {}
    if state["merge"] != "factored":  # while the base still has its own weights
        tensors = state["tensors"]
        updates = {p.name: [factors_of_dense(d, rtol, limit) for d in _dense_updates_of(p, tensors)] for p in pairs}
    restore(model, pairs, state["tensors"])
    if not updates:
        updates = {pair.name: [factored_update(pair, e) for e in range(pair.experts)] for pair in pairs}
    with atomic_folder(Path(output)) as target:
        report = write_factors(
            model, pairs, updates, target, rtol=rtol, max_rank=max_rank, per_layer=per_layer, dtype=dtype
        )
        named = BaseName(name) if name else _base_name(model, pairs[0].adapter, state)
        write_base_name(target, named)
        errors = adapter_errors(target, model, pairs, updates, report.errors)
        report = report._replace(errors=errors, vllm=tuple(vllm_objections(target)))
    if (flaw := flaw_of_name(named.name)) is not None:
        warnings.warn(f"the adapter {flaw}", stacklevel=2)
    return model, report


def export_merged(
    base: PreTrainedModel,
    folder: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    with_model: Callable[[PeftModel], None] | None = None,
    with_losses: Callable[[dict[str, float]], None] | None = None,
) -> PreTrainedModel:
    """Write the model with the whole update merged in, as sharded safetensors that ``from_pretrained`` loads.

    A quantised base is dequantised first, so that the update is added to the weights that it was trained on. Warns if
    rounding to a half-precision `dtype` loses much of a layer's update.

    Args:
        base: the model that the run started from, in the dtype and quantisation of the run; modified.
        folder: a folder with a ``scalora_state.safetensors``.
        output: the model's folder; must be empty or not exist.
        dtype: dtype of the model's weights.
        max_shard_size: maximum size of each file, as in ``PreTrainedModel.save_pretrained``.
        with_model: called with the trained model before it is dequantised and merged.
        with_losses: called with what rounding to `dtype` has changed in each layer, relative to the layer's update in
            the Frobenius norm; 0 in float32.

    Returns:
        The merged model.

    Raises:
        StateError: the state is missing or damaged, or belongs to another base.
        ExportError: the written tensors are empty, not finite or not the model's. The files have been removed.
        OSError: `output` is not empty, or can't be written to.
    """
    _require_unused(Path(output))
    state = read_state(Path(folder))
    model, pairs = _wrap(base, state)
    # In float32, a merge loses nothing that is worth the time to measure.
    norms: dict[str, float] = {}
    if dtype.itemsize == 2 and state["merge"] != "factored":  # while the base still has its own weights
        norms = {p.name: _norm(d.square().sum() for d in _dense_updates_of(p, state["tensors"])) for p in pairs}
    restore(model, pairs, state["tensors"])
    if dtype.itemsize == 2 and not norms:
        norms = {p.name: _norm(factored_update(p, e).energy for e in range(p.experts)) for p in pairs}
    if with_model is not None:
        with_model(model)
    if any(pair.quantised for pair in pairs):
        model.state_dict()  # converts 4-bit weights back from the layout that bitsandbytes uses for inference on CPUs
        model, pairs = _wrap(dequantised(model.unload()), state, check=False)
        restore(model, pairs, state["tensors"])
    losses = {}
    while pairs:
        pair = pairs.pop()
        lost = _merge_exactly(pair, dtype)
        norm = norms.get(pair.name, 0.0)
        losses[pair.name] = lost / norm if norm else 0.0
    _warn_about_losses(losses, dtype)
    if with_losses is not None:
        with_losses(losses)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Already following|All) adapters (were|are already) merged")
        merged: PreTrainedModel = model.merge_and_unload().to(dtype)
    with atomic_folder(Path(output)) as target:
        write_model(merged, target, max_shard_size=max_shard_size)
        check_model(target, merged)
    return merged


def _wrap(base: PreTrainedModel, state: dict[str, Any], *, check: bool = True) -> tuple[PeftModel, list[LoraPair]]:
    """The base with an adapter and remainders that the state's tensors fit."""
    check_content(state)
    config = saved_config(state) or ScaLoraConfig()
    state["tensors"] = _of_default_adapter(state["tensors"])
    model = _with_adapter(base, state["adapter"] or {})
    pairs, attachment = attach(model, state["merge"], config.remainder_rank)
    if check:
        _check_base(state, attachment.fingerprint)
    check_fit(model, pairs, state["tensors"])
    attachment.config = config
    attachment.restart(step=state["step"], rescales=state["rescales"])
    return model, pairs


def _of_default_adapter(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state, under the names that they have if the adapter is called as PEFT's default is."""
    names = {found[1] for name in tensors if (found := _ADAPTER_IN_NAME.search(name)) and found[1] != "default"}
    if len(names) != 1:
        return tensors
    of_adapter = re.compile(rf"\.({'|'.join(_HOLDERS)})\.{re.escape(*names)}(?=\.|$)")
    return {of_adapter.sub(r".\1.default", name): tensor for name, tensor in tensors.items()}


def _check_base(state: dict[str, Any], fingerprint: str) -> None:
    """Check that a state belongs to a base, and name an initialisation of PEFT that has changed it before training."""
    start = str((state["adapter"] or {}).get("init_lora_weights")).lower()
    if state["base"] != fingerprint and changes_the_base(start):
        raise StateError(
            f"the state was trained with init_lora_weights={start!r}, which changes the base weights before training: "
            "it does not fit the base as it is published, and can't be exported; train with another initialisation"
        )
    check_base(state, fingerprint)


def _with_adapter(base: PreTrainedModel, settings: dict[str, Any]) -> PeftModel:
    """The base with a new adapter with a state's settings, except for those that this version of PEFT does not have."""
    if settings.get("megatron_config"):
        raise StateError(
            "the state's adapter sets megatron_config, which would make PEFT import a module that the file names"
        )
    known = {field.name for field in fields(LoraConfig) if field.init} - {"base_model_name_or_path"}
    if settings.get("base_model_name_or_path") != getattr(base, "name_or_path", None):
        known.remove("revision")  # of another repository
    settings = {key: value for key, value in settings.items() if key in known}
    try:
        return get_peft_model(base, LoraConfig(**settings | {"init_lora_weights": True, "inference_mode": False}))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StateError(f"the state's adapter does not fit this base model: {error}") from None


def _base_name(model: PeftModel, adapter: str, state: dict[str, Any]) -> BaseName:
    """What an adapter names as its base: where the base was loaded from, else what the state names."""
    found, settings = base_name(model, adapter), state["adapter"] or {}
    if found.name is not None:
        return found
    name = loadable_name(settings.get("base_model_name_or_path"))
    return BaseName(name, settings.get("revision") if name else None)


def _merge_exactly(pair: LoraPair, dtype: torch.dtype) -> float:
    """Merge one layer in float32 or better and round it once, to `dtype`; returns the norm of what rounding changed."""
    weight = pair.weight.detach()
    if isinstance(pair.remainder, DenseRemainder):
        weight = pair.remainder.exact(weight)
    merged = torch.nn.Parameter(weight.to(torch.promote_types(weight.dtype, torch.float32)), False)
    setattr(pair.layer.get_base_layer(), weight_key(pair.layer), merged)
    pair.layer.merge_for_good(adapter_names=[pair.adapter])
    exact = merged.data
    merged.data = exact.to(dtype)
    return float(torch.linalg.vector_norm(merged.data.to(exact.dtype) - exact)) if dtype.itemsize == 2 else 0.0


def _norm(energies: Iterable[Tensor]) -> float:
    return math.sqrt(sum(map(float, energies)))


def _warn_about_losses(losses: dict[str, float], dtype: torch.dtype) -> None:
    worst = max(losses, key=lambda name: losses[name])
    if losses[worst] > _LOSES_MUCH:
        warnings.warn(
            f"rounding the merged weights to {dtype} changes them by up to {losses[worst]:.2g} times the update (in "
            f"{worst!r}): export in float32, or as an adapter, whose dtype rounds the update alone",
            stacklevel=3,
        )


def _dense_updates_of(pair: LoraPair, tensors: dict[str, Tensor]) -> Iterator[Tensor]:
    """The update of one layer, (m, n), or of each of its experts, from the base's weight and a state's tensors."""
    device = pair.weight.device
    weight = tensors[f"weight.{pair.name}"].to(device)
    trained = DenseRemainder(weight, transposed=pair.transposed)
    rounded_off = tensors.get(f"rounded_off.{pair.name}")
    trained.rounded_off = None if rounded_off is None else rounded_off.to(device)
    lora_A, lora_B = (tensors[f"trained.{key}"].to(device) for key in pair.keys)
    for expert in range(pair.experts):
        yield dense_update(pair, trained, weight, pair.weight.detach(), lora_A, lora_B, expert)


def _require_unused(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{str(output)!r} is not an empty folder: choose another one, or remove it first")
