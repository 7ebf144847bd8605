"""Attaches ScaLoRA to a model: remainders to its layers, and what PEFT has to know of them (paper, section 6)."""

from __future__ import annotations

from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from scalora.config import MERGES_INTO_THE_BASE, Merge, changes_the_base
from scalora.model.adapters import LoraPair, UnsupportedLayerError, find_lora_pairs
from scalora.model.attachment import Attachment, attachment_of
from scalora.model.copies import complete_copies
from scalora.model.layers import plain_name
from scalora.model.mixed_class import mix_in
from scalora.model.placement import place_remainders
from scalora.model.roots import injected_models, peft_model_of
from scalora.model.tuner import use_in_peft
from scalora.model.whole_adapter import remainder_layers, write_as_whole
from scalora.parallel.data_parallel import keep_out_of_broadcasts
from scalora.parallel.sharded_pairs import check_shards, keep_rounding_errors_with_weights
from scalora.parallel.shards import local, reshard
from scalora.parallel.zero import Zero
from scalora.rescale.remainder import FactoredRemainder
from scalora.saving.fingerprint import base_fingerprint
from scalora.saving.peft_model import SavesWholeUpdate


def attach(
    model: nn.Module, merge: Merge, remainder_rank: int, zero: Zero | None = None
) -> tuple[list[LoraPair], Attachment]:
    """Find the LoRA pairs of a model and attach their remainders.

    Args:
        model: a model with PEFT LoRA layers, a wrapper around it, or the base model inside it; modified.
        merge: kind of the remainders: ``"dense"``, ``"dense_8bit"``, ``"stochastic"``, ``"factored"``, or ``"auto"`` to
            choose by the base weights.
        remainder_rank: the most columns that a compression of a factored remainder keeps.
        zero: the optimizer of DeepSpeed's ZeRO that trains the model; None without.

    Returns:
        The pairs, and what ScaLoRA keeps on the model.

    Raises:
        UnsupportedLayerError: a module is not supported; the message names it. The model has not been changed then.
    """
    reshard(model)
    pairs = find_lora_pairs(model, sharded=True, all_shapes=True, masters=zero is not None)
    check_shards(pairs)
    peft_model = peft_model_of(model)
    injected = [] if peft_model is not None else injected_models(model)
    if any(_has_own_adapters(own) for own in injected):
        merge = _merge_for_own_adapters(merge)
    attachment = attachment_of(model)
    if attachment is None:
        root = peft_model or (injected[0] if len(injected) == 1 else model)
        for configured in injected or [root]:
            _check_start(configured, pairs[0].adapter)
        trained = frozenset(plain_name(name) for name, p in root.named_parameters() if p.requires_grad)
        attachment = Attachment(base_fingerprint(root), trained)
    place_remainders(pairs, merge, remainder_rank)
    complete_copies(model)
    pairs[0].layer.factor_guard.follow()
    for layer in (layer for pair in pairs for layer in pair.layers):
        layer.attachment = attachment
    if zero is not None:
        keep_rounding_errors_with_weights(pairs)
        pairs[0].layer.factor_guard.watch_parts(zero.flats, local)
    elif any(pair.is_sharded for pair in pairs):
        keep_rounding_errors_with_weights(pairs)
        factors: list[Tensor] = [factor for pair in pairs for factor in (pair.lora_A, pair.lora_B)]
        pairs[0].layer.factor_guard.watch_parts(factors, local)
    keep_out_of_broadcasts(model)
    use_in_peft(peft_model.base_model if peft_model is not None else None)
    for own in injected:
        _write_configuration_as_whole(own, pairs)
    if peft_model is not None and not isinstance(peft_model, SavesWholeUpdate):
        mix_in(peft_model, SavesWholeUpdate)
    return pairs, attachment


def fingerprint_of(model: nn.Module) -> str:
    """The fingerprint of a model's base, as it was before ScaLoRA changed it.

    Args:
        model: a model with PEFT layers, with or without ScaLoRA attached.
    """
    attachment = attachment_of(model)
    return attachment.fingerprint if attachment else base_fingerprint(model)


def _has_own_adapters(model: nn.Module) -> bool:
    """Whether a model saves its adapters by itself: all of Transformers can, and those of diffusers' `add_adapter`.

    Both libraries set the same attribute. Checked with diffusers 0.42, which is not imported for this.
    """
    return isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False)


def _merge_for_own_adapters(merge: Merge) -> Merge:
    """The setting for adapters that Transformers or diffusers saves by itself, which can't be merged."""
    if merge in MERGES_INTO_THE_BASE:
        raise UnsupportedLayerError(
            f"merge={merge!r} is not supported for adapters of the model's own add_adapter() (Transformers, "
            "diffusers), which are saved without what is merged into the base: set merge='factored', or use "
            "peft.get_peft_model()"
        )
    return "factored"


def _check_start(root: nn.Module, adapter: str) -> None:
    config = _configuration(root, adapter)
    start = str(getattr(config, "init_lora_weights", True)).lower()
    if changes_the_base(start):
        raise UnsupportedLayerError(
            f"init_lora_weights={start!r} has changed the base weights when the adapter was made, so an adapter of the "
            "whole update would be wrong on the original base: use init_lora_weights=True, 'gaussian', 'orthogonal' or "
            "'eva', or scalora.optimal_start"
        )


def _write_configuration_as_whole(model: nn.Module, pairs: list[LoraPair]) -> None:
    config = _configuration(model, pairs[0].adapter)
    if config is not None and isinstance(pairs[0].remainder, FactoredRemainder):
        write_as_whole(config, remainder_layers(model, pairs[0].adapter))


def _configuration(root: nn.Module, adapter: str) -> LoraConfig | None:
    config = getattr(root, "peft_config", {}).get(adapter)
    return config if isinstance(config, LoraConfig) else None
