"""Makes a live model, an ordinary adapter or a merged model from a saved state and its base (paper, section 6).

Only one whole model is in memory at a time: the base, into which the state is read layer by layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from scalora.config import ScaLoraConfig
from scalora.maths.lowrank import DEFAULT_RTOL, Factors, factors_of_dense
from scalora.model.adapters import LoraPair
from scalora.model.update import dense_update, factored_update
from scalora.rescale.remainder import DenseRemainder
from scalora.saving.attach import attach
from scalora.saving.errors import StateError
from scalora.saving.files import atomic_folder
from scalora.saving.ordinary_adapter import AdapterReport, write_factors
from scalora.saving.state import check_base, check_content, check_fit, restore, saved_config
from scalora.saving.state_file import read_state


class ExportError(RuntimeError):
    """The exported files failed verification; the message says how. They have been removed."""


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

    Returns:
        The trained model (the base with the state loaded into it), and a report of the adapter's ranks and errors.

    Raises:
        StateError: the state is missing or damaged, or belongs to another base.
        ExportError: the written tensors are empty or not finite. The files have been removed.
        OSError: `output` is not empty, or can't be written to.
    """
    _require_unused(Path(output))
    state = read_state(Path(folder))
    model, pairs = _wrap(base, state)
    limit = max_rank or max(max(pair.m, pair.n) for pair in pairs)
    updates: dict[str, Factors] = {}
    if state["merge"] == "dense":  # while the base still has its own weights
        updates = {pair.name: factors_of_dense(_dense_update_of(pair, state["tensors"]), rtol, limit) for pair in pairs}
    restore(model, pairs, state["tensors"])
    if not updates:
        updates = {pair.name: factored_update(pair) for pair in pairs}
    with atomic_folder(Path(output)) as target:
        report = write_factors(
            model, pairs, updates, target, rtol=rtol, max_rank=max_rank, per_layer=per_layer, dtype=dtype
        )
        check_tensors(target)
    return model, report


def export_merged(
    base: PreTrainedModel,
    folder: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    with_model: Callable[[PeftModel], None] | None = None,
) -> PreTrainedModel:
    """Write the model with the whole update merged in, as sharded safetensors that ``from_pretrained`` loads.

    A quantised base is dequantised first, so that the update is added to the weights that it was trained on.

    Args:
        base: the model that the run started from, in the dtype and quantisation of the run; modified.
        folder: a folder with a ``scalora_state.safetensors``.
        output: the model's folder; must be empty or not exist.
        dtype: dtype of the model's weights.
        max_shard_size: maximum size of each file, as in ``PreTrainedModel.save_pretrained``.
        with_model: called with the trained model before it is dequantised and merged.

    Returns:
        The merged model.

    Raises:
        StateError: the state is missing or damaged, or belongs to another base.
        ExportError: the written tensors are empty or not finite. The files have been removed.
        OSError: `output` is not empty, or can't be written to.
    """
    _require_unused(Path(output))
    state = read_state(Path(folder))
    model, pairs = _wrap(base, state)
    restore(model, pairs, state["tensors"])
    if with_model is not None:
        with_model(model)
    if any(pair.quantised for pair in pairs):
        model.state_dict()  # converts 4-bit weights back from the layout that bitsandbytes uses for inference on CPUs
        model, pairs = _wrap(model.unload().dequantize(), state, check=False)
        restore(model, pairs, state["tensors"])
    while pairs:
        _merge_exactly(pairs.pop(), dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already following adapters were merged")
        merged: PreTrainedModel = model.merge_and_unload().to(dtype)
    with atomic_folder(Path(output)) as target:
        merged.save_pretrained(target, max_shard_size=max_shard_size)
        check_tensors(target)
    return merged


def check_tensors(folder: Path) -> None:
    """Check that a folder has safetensors files, and that no tensor in them is empty or non-finite.

    Args:
        folder: the folder that has been written.

    Raises:
        ExportError: there is no such file, one can't be read, or a tensor is empty or has NaN or infinite entries.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ExportError(f"{str(folder)!r} has no safetensors file")
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    tensor = file.get_tensor(name)
                    if not tensor.numel():
                        raise ExportError(f"{name!r} in {path.name} is empty")
                    if tensor.is_floating_point() and not tensor.isfinite().all():
                        raise ExportError(f"{name!r} in {path.name} has NaN or infinite entries")
        except SafetensorError as error:
            raise ExportError(f"{path.name} can't be read back: {error}") from None


def _wrap(base: PreTrainedModel, state: dict[str, Any], *, check: bool = True) -> tuple[PeftModel, list[LoraPair]]:
    """The base with an adapter and remainders that the state's tensors fit."""
    check_content(state)
    config = saved_config(state) or ScaLoraConfig()
    model = _with_adapter(base, state["adapter"] or {})
    pairs, attachment = attach(model, state["merge"], config.remainder_rank)
    if check:
        check_base(state, attachment.fingerprint)
    check_fit(model, pairs, state["tensors"])
    attachment.config = config
    attachment.restart(step=state["step"], rescales=state["rescales"])
    return model, pairs


def _with_adapter(base: PreTrainedModel, settings: dict[str, Any]) -> PeftModel:
    """The base with a new adapter with a state's settings, except for those that this version of PEFT does not have."""
    if settings.get("megatron_config"):
        raise StateError(
            "the state's adapter sets megatron_config, which would make PEFT import a module that the file names"
        )
    known = {field.name for field in fields(LoraConfig) if field.init}
    settings = {key: value for key, value in settings.items() if key in known}
    try:
        return get_peft_model(base, LoraConfig(**settings | {"init_lora_weights": True, "inference_mode": False}))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StateError(f"the state's adapter does not fit this base model: {error}") from None


def _merge_exactly(pair: LoraPair, dtype: torch.dtype) -> None:
    """Merge one layer in float32 or better and round it once, to `dtype`."""
    layer, weight = pair.layer.get_base_layer(), pair.weight.detach()
    if isinstance(pair.remainder, DenseRemainder):
        weight = pair.remainder.exact(weight)
    layer.weight = torch.nn.Parameter(weight.to(torch.promote_types(weight.dtype, torch.float32)), False)
    pair.layer.merge(adapter_names=[pair.adapter])
    layer.weight.data = layer.weight.data.to(dtype)


def _dense_update_of(pair: LoraPair, tensors: dict[str, Tensor]) -> Tensor:
    """The update of one layer, (m, n), from its original weight in the base and the tensors of a state."""
    device = pair.weight.device
    weight = tensors[f"weight.{pair.name}"].to(device)
    trained = DenseRemainder(weight, transposed=pair.transposed)
    if trained.rounded_off is not None:
        trained.rounded_off = tensors[f"rounded_off.{pair.name}"].to(device)
    lora_A, lora_B = (tensors[f"trained.{key}"].to(device) for key in pair.keys)
    return dense_update(pair, trained, weight, pair.weight.detach(), lora_A, lora_B)


def _require_unused(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{str(output)!r} is not an empty folder: choose another one, or remove it first")
