"""`add_block_signs`: LoRA whose update has many times the rank of its factors (`scalora.maths.block_signs`).

It needs no rescales, and none of the engine: a step is LoRA's, with any optimizer. `scalora.PairAdamW` is the one to
take. What is saved is an ordinary adapter of the rank that the update has.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.tp_layer import LoraParallelLinear
from torch import nn

from scalora.maths.block_signs import block_signs, blocks_of, compact_A, compact_B
from scalora.model.adapters import LoraPair, UnsupportedLayerError, find_lora_pairs, refuse
from scalora.model.layers import configured_scaling, is_distributed, is_partitioned, pattern_key
from scalora.model.mixed_class import mix_in
from scalora.model.remainder_layer import RemainderLayer
from scalora.model.roots import injected_models, peft_model_of
from scalora.model.signed_factors import SignedA, SignedB, SignedLinear
from scalora.model.signed_model import SignedConfig, SignedModel
from scalora.model.whole_adapter import with_ranks

UPDATE_RANK = 256
"""The rank that updates get by default. At a width of 384 more gained little (docs/results.md); serving engines take
it."""


def add_block_signs(model: nn.Module, blocks: int | None = None) -> None:
    """Give the update of every linear LoRA layer the signs of `blocks` × `blocks` blocks, and that many times the rank.

    The factors keep their shapes, and a step its cost. PEFT takes the adapter for an ordinary one of rank
    ``r·blocks``, and its configuration says so: saved, it is one, which everything that takes LoRA adapters loads. An
    adapter that has been loaded and has block signs goes on with them, at the rank that it was trained with.

    Layers that are not linear (embeddings, convolutions, experts that are one parameter) stay plain LoRA. So do those
    of which a side can't be divided by two. A side that can't be divided into so many equal parts is divided into the
    largest power of two that it can.

    Examples:
        >>> model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
        >>> add_block_signs(model)
        >>> optimizer = PairAdamW(model)  # and train as before

    Args:
        model: a model with PEFT LoRA layers and one active adapter; modified. Its update is zero, as PEFT starts it, or
            has block signs, as one that was saved with them. The base may be quantised.
        blocks: number of parts of each side of an update, a power of two. None: those that the adapter has; of a new
            one the largest with which its rank is at most 256, that is 32 at r = 8, but at least 2.

    Raises:
        ValueError: `blocks` is not a power of two above 1; the adapter has been trained without block signs; or no
            layer can be divided.
        UnsupportedLayerError: a layer is one that ScaLoRA can't train, trains a bias of ``lora_B``, or has rescales
            (`scalora.ScaLora`) or signs of another number of blocks. The model has not been changed then.
    """
    check_blocks(blocks)
    # ZeRO-3 may have split the base when it was loaded; factors, when it was given them.
    pairs = find_lora_pairs(model, sharded=True, all_shapes=True, signed=True)
    _check_factors_are_whole(pairs)
    divisible = [pair for pair in pairs if _can_have_signs(pair)]
    if not divisible:
        raise ValueError(
            "no linear layer with LoRA has two sides that can be divided into equal parts: leave block signs out"
        )
    for pair, (of_A, of_B) in [(pair, _signed_factors(pair, blocks)) for pair in divisible]:
        _replace(pair, of_A, of_B)
    _report_ranks(model, pairs[0].adapter)


def check_blocks(blocks: int | None) -> None:
    """Check a number of blocks.

    Args:
        blocks: number of parts of each side of an update; None for the default.

    Raises:
        ValueError: it is not a power of two above 1.
    """
    if blocks is None:
        return
    if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 2 or blocks & (blocks - 1):
        raise ValueError(f"blocks must be a power of two above 1, got {blocks!r}")


def ordinary_entries(pair: LoraPair) -> int:
    """The number of entries of a layer's ordinary factors with as many signs as by default; of LoRA's if it gets none.

    Args:
        pair: the layer, with factors of PEFT's.
    """
    parts = math.gcd(pair.n, _default_blocks(pair.r)) if _can_have_signs(pair) else 1
    return parts * (pair.lora_A.numel() + pair.lora_B.numel())


def _check_factors_are_whole(pairs: list[LoraPair]) -> None:
    for pair in pairs:
        if any(is_distributed(factor) or is_partitioned(factor) for factor in (pair.lora_A, pair.lora_B)):
            refuse(
                pair.name,
                "its factors are split over processes already, and others would take their places",
                "call add_block_signs before fully_shard(), deepspeed.initialize() or accelerator.prepare()",
            )


def _default_blocks(r: int) -> int:
    return max(2, 1 << max(1, UPDATE_RANK // r).bit_length() - 1)


def _can_have_signs(pair: LoraPair) -> bool:
    linear = pair.is_matrix and pair.adapter in pair.layer.lora_A and not isinstance(pair.layer, ParamWrapper)
    return linear and block_signs(pair.m, pair.n, 2, device="meta") is not None


def _signed_factors(pair: LoraPair, blocks: int | None) -> tuple[SignedA, SignedB]:
    """PEFT's modules of a layer with signs. Refuses what can't be trained with them, and an update that they change."""
    of_B = pair.layer.lora_B[pair.adapter]
    if isinstance(pair.layer, RemainderLayer):
        raise UnsupportedLayerError(
            f"module {pair.name!r} has ScaLoRA's rescales, which block signs can't be combined with: train with one of "
            "them"
        )
    if isinstance(of_B, SignedB):
        _chosen(pair, [of_B.blocks], blocks)
        return pair.layer.lora_A[pair.adapter], of_B
    if of_B.bias is not None:
        raise UnsupportedLayerError(f"module {pair.name!r} trains a bias with LoRA: set lora_bias=False")
    A, B = pair.lora_A, pair.lora_B
    found = [] if A.is_meta else blocks_of(A, B)
    if not found and not B.is_meta and B.any():
        raise ValueError(
            f"the update of module {pair.name!r} is not zero and has no block signs, which would change it: add "
            "them to a new adapter, with init_lora_weights=True, before it is trained"
        )
    count = _chosen(pair, found, blocks) if found else blocks or _default_blocks(pair.r)
    parts = math.gcd(pair.n, count)
    if found:
        A, B = (nn.Parameter(factor.detach().clone()) for factor in (compact_A(A, parts), compact_B(B, parts)))
    return SignedA(A, count, parts), SignedB(B, count, parts)


def _chosen(pair: LoraPair, found: list[int], blocks: int | None) -> int:
    """The number of blocks of a layer that has signs."""
    if blocks not in (None, *found):
        raise UnsupportedLayerError(
            f"module {pair.name!r} has the signs of {found[0]} blocks already: set blocks={found[0]}"
        )
    return blocks or found[0]


def _replace(pair: LoraPair, of_A: SignedA, of_B: SignedB) -> None:
    layer, name, scaling, rank = pair.layer, pair.adapter, pair.scaling, of_A.out_features
    for module, parameter in ((of_A, pair.lora_A), (of_B, pair.lora_B)):
        if module.factor is not parameter:  # an optimizer may have PEFT's parameters already
            parameter.data, parameter.grad = module.factor.data, None
            module.factor = parameter
    layer.lora_A[name], layer.lora_B[name] = of_A, of_B
    layer.r[name], layer.lora_alpha[name], layer.use_rslora[name] = rank, scaling * rank, False
    if not isinstance(layer, (SignedLinear, LoraParallelLinear)):  # Megatron's layers give tuples
        mix_in(layer, SignedLinear)


def _report_ranks(model: nn.Module, adapter: str) -> None:
    """Put the ranks that the updates have into the adapter's configuration. The user's own object is not changed."""
    if (peft_model := peft_model_of(model)) is not None:
        if not isinstance(peft_model, SignedModel):
            mix_in(peft_model, SignedModel)
        _report_ranks_in(peft_model.base_model.model, peft_model.peft_config, adapter)
    elif injected := injected_models(model):
        for module in injected:
            _report_ranks_in(module, module.peft_config, adapter)
    else:
        warnings.warn(
            "the model has LoRA layers and no configuration of PEFT's. If it is a part of one that has, call "
            "add_block_signs on the whole: what is saved has the rank r·blocks, and its configuration would say r",
            stacklevel=3,
        )


def _report_ranks_in(base: nn.Module, configurations: Any, adapter: str) -> None:
    if adapter not in configurations:
        return
    layers = {
        pattern_key(name, layer): layer
        for name, layer in base.named_modules()
        if isinstance(layer, LoraLayer) and adapter in layer.r
    }
    ranks = {key: layer.r[adapter] for key, layer in layers.items()}
    scalings = {key: configured_scaling(layer, adapter) for key, layer in layers.items()}
    config = with_ranks(configurations[adapter], ranks, scalings)
    config.__class__ = SignedConfig
    configurations[adapter] = config
