"""Checks exported files after they have been written: nothing empty, missing, non-finite or of another rank."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME as PEFT_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from scalora.maths.lowrank import Factors, factors_of_product
from scalora.model.adapters import LoraPair
from scalora.model.layers import pattern_key


class ExportError(RuntimeError):
    """The exported files failed verification; the message says how. They have been removed."""


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
        for name, tensor in _tensors(path):
            if not tensor.numel():
                raise ExportError(f"{name!r} in {path.name} is empty")
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ExportError(f"{name!r} in {path.name} has NaN or infinite entries")


def check_model(folder: Path, model: nn.Module) -> None:
    """Check that the files of a merged model hold the model that is in memory.

    Args:
        folder: the folder that has been written.
        model: the merged model.

    Raises:
        ExportError: a tensor in a file differs from the model's, or `check_tensors` finds a flaw.
    """
    check_tensors(folder)
    state = model.state_dict()
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in _tensors(path):
            # Transformers stores some architectures under other names or in other shapes than they have in memory.
            own = state.get(name)
            if own is not None and own.shape == tensor.shape and not torch.equal(own.cpu(), tensor):
                raise ExportError(f"{name!r} in {path.name} is not the merged model's")


def adapter_errors(
    folder: Path,
    model: PeftModel,
    pairs: list[LoraPair],
    updates: Mapping[str, Sequence[Factors]],
    left_out: Mapping[str, float],
) -> dict[str, float]:
    """Read a written adapter back, as PEFT would, and measure how far each layer is from the update.

    Args:
        folder: the adapter's folder.
        model: the PEFT model that it was written from.
        pairs: its LoRA pairs.
        updates: the whole update of each layer, or of each of its experts, by the pair's name.
        left_out: error of each layer that its rank allows for, relative to the update in the Frobenius norm.

    Returns:
        The measured relative error of each layer, with rounding to the file's dtype.

    Raises:
        ExportError: something that was trained is missing, a rank or a scaling is not what the configuration says, or
            an error is larger than its rank and the rounding explain.
    """
    check_tensors(folder)
    config = json.loads((folder / PEFT_CONFIG_NAME).read_text(encoding="utf-8"))
    tensors = dict(_tensors(folder / SAFETENSORS_WEIGHTS_NAME))
    adapter = pairs[0].adapter
    _check_complete(model, adapter, tensors)
    errors = {}
    for pair in pairs:
        A, B = (tensors[_in_file(key, adapter)] for key in pair.keys)
        module = pattern_key(pair.name.removeprefix("base_model.model."), pair.layer)
        rank, scaling = _rank_and_scaling(config, module)
        rows = rank * pair.experts
        if A.shape != (rows, *pair.lora_A.shape[1:]) or B.shape[:2] != (pair.m, rows):
            raise ExportError(
                f"the factors of {pair.name!r} are {tuple(B.shape)} and {tuple(A.shape)}, but adapter_config.json says "
                f"rank {rank}"
            )
        written = zip(pair.matrices_of_B(B), pair.matrices_of_A(A), strict=True)
        errors[pair.name] = _relative_error(updates[pair.name], list(written), scaling)
        # Rounding each entry to nearest changes a product by at most two units of its dtype; twice that is generous.
        allowed = 1.01 * left_out[pair.name] + 2 * torch.finfo(A.dtype).eps + 1e-6
        if not errors[pair.name] <= allowed:
            reason = f": {A.dtype} can't hold factors this small; choose another dtype" if A.dtype.itemsize == 2 else ""
            raise ExportError(
                f"the adapter of {pair.name!r} differs from the layer's update by {errors[pair.name]:.3g} of its norm, "
                f"more than the {allowed:.3g} that its rank and dtype account for{reason}"
            )
    return errors


def _check_complete(model: PeftModel, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        written = tensors.get(_in_file(name, adapter))
        if written is None:
            raise ExportError(
                f"{name!r} was trained, but PEFT has not written it to the adapter: export the merged model instead"
            )
        if ".lora_" not in name and not torch.equal(written, parameter.detach().cpu().to(written.dtype)):
            raise ExportError(f"{name!r} in the adapter is not the trained model's")


def _in_file(name: str, adapter: str) -> str:
    """The name of a parameter in the file that PEFT writes, which has no names of adapters."""
    name = name.replace(f".modules_to_save.{adapter}.", ".")
    stem, _, last = name.rpartition(f".{adapter}")
    return stem + last if stem and last in ("", ".weight", ".bias") else name


def _rank_and_scaling(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """The rank and the scaling that PEFT gives a module when it loads an adapter."""
    rank, alpha = (
        config[pattern].get(get_pattern_key(config[pattern], module), config[default])
        for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    return rank, alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


def _relative_error(updates: Sequence[Factors], written: Sequence[tuple[Tensor, Tensor]], scaling: float) -> float:
    """Frobenius norm of the updates minus ``scaling·left·right``, relative to that of the updates."""
    lost = energy = 0.0
    for update, (left, right) in zip(updates, written, strict=True):
        device = update.left.device
        left, right = (scaling * left.double()).to(device), right.double().mT.to(device)
        kept = update.values.square().sum()
        difference = factors_of_product(
            torch.cat([update.left * update.values, -left], dim=1), torch.cat([update.right, right], dim=1)
        )
        lost += (difference.energy + (update.energy - kept).clamp_min(0)).item()
        energy += update.energy.item()
    if not energy:
        return 0.0 if not lost else math.inf
    return math.sqrt(lost / energy)


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with _readable(path), safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            yield name, file.get_tensor(name)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, FileNotFoundError) as error:
        raise ExportError(f"{path.name} can't be read back: {error}") from None
