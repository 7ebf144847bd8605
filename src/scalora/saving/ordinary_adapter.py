"""Writes the whole update of a run as an ordinary LoRA adapter, which PEFT loads on the untouched base without scalora.

Dull on purpose, so that everything that takes PEFT adapters takes it: one rank for all layers, alpha equal to it (a
scaling of 1), no rsLoRA, nothing in ``modules_to_save`` that was not trained there.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from scalora.maths.lowrank import DEFAULT_RTOL, Factors, rank_for_tolerance
from scalora.model.adapters import LoraPair
from scalora.model.factored_layer import REMAINDER
from scalora.model.update import factored_update
from scalora.saving.files import naming_errors

# The ranks that vLLM's --max-lora-rank takes (its LoRAConfig, version 0.11).
_SERVING_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class AdapterReport(NamedTuple):
    """What was written.

    Attributes:
        ranks: of each layer in the file.
        needed: the rank that each layer needs for the tolerance.
        errors: what is left out of each layer's update, as a share of its Frobenius norm.
        norms: Frobenius norm of each layer's update.
    """

    ranks: dict[str, int]
    needed: dict[str, int]
    errors: dict[str, float]
    norms: dict[str, float]

    @property
    def serving_rank(self) -> int:
        """The maximum rank that a serving engine must allow (vLLM's ``--max-lora-rank``)."""
        largest = max(self.ranks.values())
        return next((rank for rank in _SERVING_RANKS if rank >= largest), largest)

    @property
    def error(self) -> float:
        """What is left out of the whole update, all layers together, as a share of its Frobenius norm."""
        lost = sum((self.errors[name] * norm) ** 2 for name, norm in self.norms.items())
        return math.sqrt(lost / total) if (total := sum(norm**2 for norm in self.norms.values())) else 0.0


def write_adapter(model: PeftModel, pairs: list[LoraPair], folder: Path) -> AdapterReport:
    """`write_factors` of a live model with factored remainders, at the default tolerance (`save_pretrained`)."""
    return write_factors(model, pairs, {pair.name: factored_update(pair) for pair in pairs}, folder)


def write_factors(
    model: PeftModel,
    pairs: list[LoraPair],
    updates: Mapping[str, Factors],
    folder: Path,
    *,
    rtol: float = DEFAULT_RTOL,
    max_rank: int | None = None,
    per_layer: bool = False,
    dtype: torch.dtype = torch.float32,
) -> AdapterReport:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``; each file appears whole or not at all.

    Args:
        model: a PEFT model with the run's LoRA configuration; what it trains beside LoRA is written as it is in it.
        pairs: of the model.
        updates: the whole update of each layer, by the pair's name.
        folder: exists.
        rtol: share of each update's Frobenius norm that may be left out.
        max_rank: never more than this; the tolerance may then be missed, which the report shows.
        per_layer: each layer the rank that it needs (PEFT's ``rank_pattern``) instead of one rank for all.
        dtype: of the adapter's tensors.
    """
    limit = max_rank or math.inf
    needed = {name: max(1, rank_for_tolerance(update, rtol)) for name, update in updates.items()}
    capped = {name: int(min(rank, limit)) for name, rank in needed.items()}
    largest = max(capped.values())
    ranks = capped if per_layer else dict.fromkeys(capped, largest)
    # PEFT takes whatever is in its layers beside the base for the adapter's.
    state = {key: tensor for key, tensor in model.state_dict().items() if f".{REMAINDER}." not in key}
    errors, norms = {}, {}
    for pair in pairs:
        update = updates[pair.name].truncated(ranks[pair.name])
        root = update.values.sqrt()
        A = _padded(update.left * root, ranks[pair.name])
        B = _padded(update.right * root, ranks[pair.name])
        key_A, key_B = pair.keys
        state[key_A], state[key_B] = B.mT.contiguous().to(dtype), A.contiguous().to(dtype)
        if (bias := key_B.removesuffix("weight") + "bias") in state:  # lora_bias=True
            state[bias] = (state[bias] * pair.scaling).to(dtype)
        norms[pair.name] = update.energy.sqrt().item()
        errors[pair.name] = update.discarded().sqrt().item() / norms[pair.name] if norms[pair.name] else 0.0
    _save_with_peft(model, pairs[0].adapter, state, ranks if per_layer else {}, largest, folder)
    return AdapterReport(ranks, needed, errors, norms)


def _padded(factor: Tensor, rank: int) -> Tensor:
    return torch.nn.functional.pad(factor, (0, rank - factor.shape[1]))


def _save_with_peft(
    model: PeftModel, adapter: str, state: dict[str, Tensor], ranks: dict[str, int], largest: int, folder: Path
) -> None:
    """Have PEFT write another configuration and other tensors than the model's own, then move the files into place."""
    own = model.peft_config[adapter]
    config = copy.deepcopy(own)
    config.r = config.lora_alpha = largest
    config.rank_pattern = {name.removeprefix("base_model.model."): rank for name, rank in ranks.items()}
    config.alpha_pattern = dict(config.rank_pattern)
    config.use_rslora = False
    config.init_lora_weights = True
    try:
        model.peft_config[adapter] = config
        with (
            naming_errors(folder),
            tempfile.TemporaryDirectory(dir=folder, prefix=".adapter-", suffix=".partial") as temporary,
        ):
            PeftModel.save_pretrained(
                model, temporary, selected_adapters=[adapter], state_dict=state, save_embedding_layers=False
            )
            for path in sorted(p for p in Path(temporary).rglob("*") if p.is_file()):
                target = folder / path.relative_to(temporary)
                target.parent.mkdir(exist_ok=True)
                path.replace(target)
    finally:
        model.peft_config[adapter] = own
