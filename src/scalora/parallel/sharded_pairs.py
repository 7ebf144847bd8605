"""LoRA pairs of a sharded model (FSDP2): which can be trained, and what goes with their shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.optim import Optimizer

from scalora.model.adapters import LoraPair, refuse
from scalora.model.layers import factors_of, is_copy, is_distributed, is_partitioned
from scalora.parallel.shards import axis_key, split_as, unusual_placements
from scalora.parallel.zero import run_of_weight
from scalora.rescale.optimizers import Kind, UnsupportedOptimizerError
from scalora.rescale.quantised_state import COMPANIONS
from scalora.rescale.remainder import DenseRemainder


def check_shards(pairs: list[LoraPair]) -> None:
    """Check that tensors are sharded as FSDP2 shards them, and as few ways as are supported.

    Args:
        pairs: the LoRA pairs of one model.

    Raises:
        UnsupportedLayerError: they are sharded in another way; the message names the module.
    """
    for pair in pairs:
        tensors = {"base weight": pair.weight, "lora_A": pair.lora_A, "lora_B": pair.lora_B}
        for key, tensor in tensors.items():
            if is_distributed(tensor) and (placements := unusual_placements(tensor)):
                refuse(
                    pair.name,
                    f"its {key} is split as {placements}, as by tensor parallelism",
                    "shard by rows, with fully_shard() (FSDP2), or train with DistributedDataParallel",
                )
        if axis_key(pair.lora_A) != axis_key(pair.lora_B):
            refuse(
                pair.name,
                "of lora_A and lora_B one is split and the other not, or over other processes, as by tensor "
                "parallelism",
                "shard with fully_shard() (FSDP2), or train with DistributedDataParallel",
            )


def check_optimizer_of_parts(pairs: list[LoraPair], optimizer: Optimizer, kinds: Mapping[str, Kind]) -> None:
    """Check that an optimizer's state can be carried over where factors are split, over processes or experts.

    Args:
        pairs: the LoRA pairs of one model.
        optimizer: the optimizer of their factors.
        kinds: how each entry of its state depends on the gradients.

    Raises:
        UnsupportedOptimizerError: it can't.
    """
    if not any(key in COMPANIONS for key in kinds):
        return
    in_blocks = f"optimizer {type(optimizer).__name__} keeps its state in blocks of entries, which"
    if any(pair.is_sharded for pair in pairs):
        raise UnsupportedOptimizerError(
            f"{in_blocks} shards cut up: with FSDP2 use torch.optim.AdamW, or train with DistributedDataParallel"
        )
    # Checked with bitsandbytes 0.50, whose optimizers with 32 bits keep plain tensors.
    in_8_bits = getattr(getattr(optimizer, "args", None), "optim_bits", 8) == 8
    if in_8_bits and (other := next((pair for pair in pairs if not pair.is_matrix), None)) is not None:
        kind = "experts" if other.experts > 1 else "a convolution"
        raise UnsupportedOptimizerError(
            f"{in_blocks} is not supported for {kind} (module {other.name!r}): use torch.optim.AdamW or an optimizer "
            "with 32 bits, or leave the module out of the adapter"
        )


def check_not_sharded_since(pairs: list[LoraPair], *, divided: bool) -> None:
    """Check that layers still have the parameters that they had when ScaLoRA was attached.

    Args:
        pairs: the LoRA pairs of one model.
        divided: whether DeepSpeed's optimizer had them then.

    Raises:
        UnsupportedLayerError: they have been sharded since.
    """
    for pair in pairs:
        if not divided and any(is_copy(factor) or is_partitioned(factor) for factor in (pair.lora_A, pair.lora_B)):
            refuse(
                pair.name,
                "DeepSpeed has taken its parameters over since ScaLoRA was attached, and steps others in their place",
                "attach ScaLoRA after deepspeed.initialize() or accelerator.prepare(), to the optimizer that it "
                "returns",
            )
        if not is_distributed(pair.lora_A) and is_distributed(factors_of(pair.layer, pair.adapter)[0]):
            refuse(
                pair.name,
                "it has been sharded since ScaLoRA was attached, whose parameters are no longer trained",
                "attach ScaLoRA after fully_shard() or accelerator.prepare()",
            )


def held_by(optimizer: Optimizer) -> set[int]:
    """The ids of an optimizer's parameters.

    Args:
        optimizer: the optimizer.
    """
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def check_held(optimizer: Optimizer, pairs: list[LoraPair]) -> None:
    """Check that an optimizer that steps factors in pairs still has them.

    Args:
        optimizer: the optimizer.
        pairs: the LoRA pairs that it was made for, as they are now.

    Raises:
        UnsupportedOptimizerError: it has others.
    """
    held = held_by(optimizer)
    if (lost := next((pair for pair in pairs if id(pair.lora_A) not in held), None)) is not None:
        raise UnsupportedOptimizerError(
            f"{type(optimizer).__name__} does not have the factors of module {lost.name!r} any more, which it steps in "
            "pairs: DeepSpeed and FSDP1 put flat copies in their places. Use torch.optim.AdamW there, or train with "
            "FSDP2 or DistributedDataParallel"
        )


def with_their_shards(pairs: list[LoraPair]) -> list[LoraPair]:
    """The pairs with the shards that have taken the places of their parameters.

    Args:
        pairs: the LoRA pairs of one model, found before it was sharded or after.
    """
    current = []
    for pair in pairs:
        lora_A, lora_B = factors_of(pair.layer, pair.adapter)
        new = is_distributed(lora_A) and lora_A is not pair.lora_A
        current.append(replace(pair, lora_A=lora_A, lora_B=lora_B) if new else pair)
    return current


def keep_rounding_errors_with_weights(pairs: list[LoraPair]) -> None:
    """Split what dense remainders keep beside weights as the weights are, also if these have been sharded since.

    It is left out of state dicts, because no backend sends int16, and DeepSpeed would write it into checkpoints that
    lack the weights: `scalora.saving.state` has it.

    Args:
        pairs: the LoRA pairs of one model, with remainders.
    """
    for pair in pairs:
        remainder = pair.remainder
        if not isinstance(remainder, DenseRemainder) or (low := remainder.rounded_off) is None:
            continue
        if (run := run_of_weight(pair.weight)) is not None:
            low = low if low.shape == run.flat.shape else torch.zeros_like(run.flat, dtype=low.dtype)
        remainder.register_buffer("rounded_off", split_as(low, pair.weight), persistent=False)
