"""Writes the whole update as an ordinary LoRA adapter, which PEFT loads on the original base (paper, section 6).

The adapter uses no special features, so that everything that takes PEFT adapters takes it: one rank for all layers,
alpha equal to the rank (a scaling of 1), no rsLoRA, and only modules that were trained in ``modules_to_save``.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from scalora.maths.lowrank import DEFAULT_RTOL, Factors, rank_for_tolerance
from scalora.model.adapters import LoraPair
from scalora.model.layers import pattern_key, pattern_of
from scalora.model.matrices import stored_factors
from scalora.model.tuner import tensors_as_given
from scalora.model.update import factored_update
from scalora.saving.base_name import base_name, write_base_name
from scalora.saving.files import naming_errors
from scalora.saving.readme import README, is_own_readme
from scalora.saving.vllm import serving_rank


class AdapterReport(NamedTuple):
    """Ranks and errors of an adapter that was written.

    Attributes:
        ranks: rank of each layer in the file, by the layer's name.
        needed: rank that each layer needs for the tolerance.
        errors: Frobenius norm of what is left out of each layer's update, relative to that of the update. Of a layer
            with experts, the update of all of them.
        norms: Frobenius norm of each layer's update.
        vllm: what vLLM does not take of the adapter (`scalora.saving.vllm.vllm_objections`); empty if it takes it, or
            nobody has looked.
    """

    ranks: dict[str, int]
    needed: dict[str, int]
    errors: dict[str, float]
    norms: dict[str, float]
    vllm: tuple[str, ...] = ()

    @property
    def serving_rank(self) -> int:
        """The smallest maximum rank of a serving engine that accepts the adapter (vLLM's ``--max-lora-rank``)."""
        return serving_rank(max(self.ranks.values()))

    @property
    def error(self) -> float:
        """Frobenius norm of what is left out of all layers together, relative to that of the whole update."""
        lost = sum((self.errors[name] * norm) ** 2 for name, norm in self.norms.items())
        return math.sqrt(lost / total) if (total := sum(norm**2 for norm in self.norms.values())) else 0.0


def write_adapter(
    model: PeftModel,
    pairs: list[LoraPair],
    folder: Path,
    *,
    safe_serialization: bool = True,
    save_embedding_layers: bool | str = False,
) -> AdapterReport:
    """Write the adapter of a model with factored remainders, at the default tolerance.

    Args:
        model: the PEFT model.
        pairs: its LoRA pairs, with factored remainders.
        folder: the folder to write to; must exist.
        safe_serialization: as in PEFT's ``save_pretrained``.
        save_embedding_layers: as in PEFT's ``save_pretrained``.

    Returns:
        Ranks and errors of the adapter.
    """
    updates = {pair.name: [factored_update(pair, e) for e in range(pair.experts)] for pair in pairs}
    return write_factors(
        model,
        pairs,
        updates,
        folder,
        safe_serialization=safe_serialization,
        save_embedding_layers=save_embedding_layers,
    )


def write_factors(
    model: PeftModel,
    pairs: list[LoraPair],
    updates: Mapping[str, Sequence[Factors]],
    folder: Path,
    *,
    rtol: float = DEFAULT_RTOL,
    max_rank: int | None = None,
    per_layer: bool = False,
    dtype: torch.dtype = torch.float32,
    safe_serialization: bool = True,
    save_embedding_layers: bool | str = False,
) -> AdapterReport:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, each of them atomically.

    Args:
        model: a PEFT model with the run's LoRA configuration. Modules that are trained in addition to LoRA are
            written with their current weights.
        pairs: the model's LoRA pairs.
        updates: the whole update of each layer, or of each of its experts, by the pair's name. Experts of a layer have
            one rank.
        folder: the folder to write to; must exist. A README.md of the user's in it is not changed.
        rtol: the largest error allowed in each layer, relative to the Frobenius norm of its update.
        max_rank: the largest rank allowed, even if errors then exceed `rtol`. None: no limit.
        per_layer: whether each layer has its own rank (PEFT's ``rank_pattern``). By default all have the largest one.
        dtype: dtype of the adapter's tensors.
        safe_serialization: as in PEFT's ``save_pretrained``.
        save_embedding_layers: as in PEFT's ``save_pretrained``.

    Returns:
        Ranks and errors of the adapter.

    Raises:
        OSError: the folder can't be written to.
    """
    limit = max_rank or math.inf
    needed = {name: max(1, *(rank_for_tolerance(one, rtol) for one in of_layer)) for name, of_layer in updates.items()}
    capped = {name: int(min(rank, limit)) for name, rank in needed.items()}
    largest = max(capped.values())
    ranks = capped if per_layer else dict.fromkeys(capped, largest)
    state = model.state_dict()
    errors, norms = {}, {}
    for pair in pairs:
        truncated = [update.truncated(ranks[pair.name]) for update in updates[pair.name]]
        A = [_padded(update.left * update.values.sqrt(), ranks[pair.name]) for update in truncated]
        Bt = [_padded(update.right * update.values.sqrt(), ranks[pair.name]).mT for update in truncated]
        matrices = (Bt[0], A[0]) if pair.experts == 1 else (torch.stack(Bt), torch.stack(A))
        lora_A, lora_B = stored_factors(*matrices, (pair.lora_A, pair.lora_B))
        key_A, key_B = pair.keys
        state[key_A], state[key_B] = lora_A.contiguous().to(dtype), lora_B.contiguous().to(dtype)
        if pair.twin is not None:
            for key, factor in zip(pair.twin.keys, (state[key_B], state[key_A]), strict=True):
                state[key] = factor.mT.contiguous()
        if (bias := key_B.removesuffix("weight") + "bias") in state:  # lora_bias=True
            state[bias] = (state[bias] * pair.scaling).to(dtype)
        norms[pair.name] = sum(update.energy.item() for update in truncated) ** 0.5
        lost = sum(update.discarded().item() for update in truncated) ** 0.5
        errors[pair.name] = lost / norms[pair.name] if norms[pair.name] else 0.0
    settings = {"safe_serialization": safe_serialization, "save_embedding_layers": save_embedding_layers}
    patterns = {
        pattern_key(layer.name.removeprefix("base_model.model."), layer.layer): ranks[pair.name]
        for pair in pairs
        for layer in (pair, pair.twin)
        if per_layer and layer is not None
    }
    _save_with_peft(model, pairs[0].adapter, state, patterns, largest, folder, settings)
    return AdapterReport(ranks, needed, errors, norms)


def _padded(factor: Tensor, rank: int) -> Tensor:
    return torch.nn.functional.pad(factor, (0, rank - factor.shape[1]))


def _save_with_peft(
    model: PeftModel,
    adapter: str,
    state: dict[str, Tensor],
    layers: dict[str, int],
    largest: int,
    folder: Path,
    settings: dict[str, Any],
) -> None:
    """Have PEFT write another configuration and other tensors than the model's, then move the files to the folder."""
    own = model.peft_config[adapter]
    config = copy.deepcopy(own)
    config.r = config.lora_alpha = largest
    config.rank_pattern = {pattern_of(name, layers): rank for name, rank in layers.items()}
    config.alpha_pattern = dict(config.rank_pattern)
    config.use_rslora = False
    config.init_lora_weights = True
    try:
        model.peft_config[adapter] = config
        with (
            naming_errors(folder),
            tensors_as_given(),
            tempfile.TemporaryDirectory(dir=folder, prefix=".adapter-", suffix=".partial") as temporary,
        ):
            PeftModel.save_pretrained(model, temporary, selected_adapters=[adapter], state_dict=state, **settings)
            # PEFT writes an adapter of another name than its default into a folder of that name.
            written = Path(temporary) if adapter == "default" else Path(temporary) / adapter
            write_base_name(written, base_name(model, adapter))
            for path in sorted(p for p in Path(temporary).rglob("*") if p.is_file()):
                target = folder / path.relative_to(temporary)
                if target.name == README and target.exists() and not is_own_readme(target):
                    continue  # the user's, or a trainer's model card
                target.parent.mkdir(exist_ok=True)
                path.replace(target)
    finally:
        model.peft_config[adapter] = own
