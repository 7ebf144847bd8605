"""What a trainer itself does with the model that it trains, and so needs of the remainder's place.

Trainers don't say it. It is read from their attributes, as TRL 1.16, axolotl 0.19 and ms-swift 4.6 have them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from transformers import Seq2SeqTrainer

from scalora.config import MERGES_INTO_THE_BASE, ScaLoraConfig
from scalora.model.adapters import find_lora_pairs
from scalora.model.remainder_layer import ChangedBaseError
from scalora.model.whole_adapter import remainder_layers
from scalora.parallel.processes import failing_together
from scalora.rescale.remainder import DenseRemainder, FactoredRemainder
from scalora.saving.vllm import serving_rank

_REFERENCE = "the trainer computes its reference with the adapter disabled or another one"
_SENDS_THE_ADAPTER = "the trainer sends the adapter alone to the server that generates"


def config_for_trainer(config: ScaLoraConfig, trainer: Any, model: nn.Module) -> ScaLoraConfig:
    """The settings for a trainer: with ``auto``, the remainder's place is the one that is right there.

    A trainer whose reference is its own model without the adapter needs the base unchanged, and so does one that sends
    the adapter alone to a server that generates (vLLM): what it saves for that is an adapter of the whole update. One
    that sends sums of base weights and factors needs merges into the base. Those that merge before they send, as TRL's
    GRPOTrainer, need nothing.

    Args:
        config: the settings.
        trainer: the trainer; None if there is none.
        model: the model.

    Raises:
        ChangedBaseError: the settings, or an earlier training, are at odds with it.
        ValueError: the server takes adapters of a lower rank than the whole update may have.
    """
    if _needs_the_base(trainer):
        config = _with_the_base(config, model, _REFERENCE, "pass a ref_model")
    if getattr(trainer, "rollout_enable_lora", False):
        raise ChangedBaseError(
            "with vllm_enable_lora, ms-swift sends lora_A and lora_B alone, which are not the whole update: leave it "
            "out, and merged weights are sent"
        )
    if _sends_the_adapter(trainer):
        config = _with_the_base(config, model, _SENDS_THE_ADAPTER, "have it send merged weights")
        _check_rank(trainer, config, model)
    elif _sends_sums(trainer):
        config = _with_merges(config, model)
    return config


def _needs_the_base(trainer: Any) -> bool:
    """Whether a trainer's reference (DPO, KTO, GRPO with β > 0, …) is its own model without or with another adapter.

    As TRL's trainers tell it: ``ref_model`` is None. LLaMA-Factory's trainer for supervised fine-tuning has that
    attribute for a loss that never takes the model itself.
    """
    if trainer is None or isinstance(trainer, Seq2SeqTrainer):
        return False
    own = vars(trainer).get("ref_model", trainer) is None
    precomputed = getattr(trainer, "precompute_ref_logps", False)
    return own and not precomputed and getattr(trainer, "beta", None) != 0


def _sends_the_adapter(trainer: Any) -> bool:
    """Whether a trainer saves the adapter for a server: TRL's asynchronous ones, and axolotl with vllm_lora_sync."""
    if hasattr(trainer, "_sync_lora_adapter"):
        return bool(getattr(trainer, "use_vllm", False) and getattr(trainer.args, "vllm_lora_sync", False))
    return bool(getattr(trainer, "_lora_sync", False))


def _sends_sums(trainer: Any) -> bool:
    """Whether a trainer adds lora_A and lora_B to the base weights itself, for a server: axolotl's GRPO."""
    return hasattr(trainer, "_sync_peft_weights_no_merge") and bool(getattr(trainer, "use_vllm", False))


def _with_the_base(config: ScaLoraConfig, model: nn.Module, reason: str, way_out: str) -> ScaLoraConfig:
    """The settings for a model whose base must stay what it is: ``auto`` becomes factored."""
    if config.merge in MERGES_INTO_THE_BASE or isinstance(_remainder(model), DenseRemainder):
        merge = config.merge if config.merge in MERGES_INTO_THE_BASE else "dense"
        raise ChangedBaseError(
            f"{reason}, but merge={merge!r} changes the base weights: set merge='factored' (with merge='auto' it is), "
            f"or {way_out}"
        )
    return replace(config, merge="factored")


def _with_merges(config: ScaLoraConfig, model: nn.Module) -> ScaLoraConfig:
    """The settings for a model whose remainder must be in the base weights: ``auto`` becomes dense."""
    if config.merge == "factored" or isinstance(_remainder(model), FactoredRemainder):
        raise ChangedBaseError(
            "the trainer sends the base weights plus lora_A and lora_B to the server that generates, without the "
            "remainder of merge='factored': set trl.vllm_lora_sync: true, or merge='dense' where there is no reference"
        )
    return replace(config, merge="dense") if config.merge == "auto" else config


def _check_rank(trainer: Any, config: ScaLoraConfig, model: nn.Module) -> None:
    """Check that TRL's server takes the whole update, whose rank grows with the rescales, before it has grown."""
    pairs = find_lora_pairs(model, all_shapes=True)  # shards are refused: the trainer saves what one process has
    needed = max(min(pair.m, pair.n, pair.r + 2 * config.remainder_rank) for pair in pairs)
    client: Any = getattr(trainer, "vllm_client", None)  # in the first process
    with failing_together(ValueError):
        if not hasattr(client, "get_server_info"):
            return
        allowed = client.get_server_info()["lora_config"]["max_lora_rank"]
        if allowed < needed:
            raise ValueError(
                f"the server was started with --max-lora-rank {allowed}, but adapters of the whole update have ranks "
                f"of up to {needed}: start it with {serving_rank(needed)}, or lower remainder_rank"
            )


def _remainder(model: nn.Module) -> nn.Module | None:
    """The remainder of an earlier training, if there was one."""
    layer = next(iter(remainder_layers(model).values()), None)
    return None if layer is None else layer.remainder
