"""Memory of training without activations: the base, the adapter, and what ScaLoRA adds to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from scalora.config import Merge
from scalora.model.adapters import LoraPair, by_shape, find_lora_pairs
from scalora.model.layers import LINEAR
from scalora.model.placement import bytes_beside

# bitsandbytes' 4-bit weights have a float32 scale for each block of so many entries (no double quantisation here).
_NF4_BLOCK = 64

# Bytes of a float32 entry, as in an adapter, and of a float64 entry, as in the solver's copies.
_SINGLE, _DOUBLE = 4, 8

# Moments that Adam keeps of each trained weight.
_MOMENTS = 2


@dataclass(frozen=True)
class Memory:
    """Bytes of memory, by part; LoRA needs the first four.

    Attributes:
        base: the base weights.
        adapter: the adapter's weights.
        gradients: the gradients of the trained weights.
        optimizer: the optimizer's state: Adam's two moments of the trained weights, or what `scalora.PairAdamW` keeps.
        remainder: what ScaLoRA keeps in addition to the weights, at its largest.
        scratch: temporary tensors of a rescale, for the largest stack of layers of one shape; free again after it.
    """

    base: int
    adapter: int
    gradients: int
    optimizer: int
    remainder: int = 0
    scratch: int = 0

    @property
    def lora(self) -> int:
        """Total of LoRA."""
        return self.base + self.adapter + self.gradients + self.optimizer

    @property
    def scalora(self) -> int:
        """Total of ScaLoRA."""
        return self.lora + self.remainder + self.scratch


def training_memory(
    base: int,
    adapter: int,
    trained: int,
    pairs: Sequence[LoraPair] = (),
    merge: Merge = "dense",
    remainder_rank: int = 0,
    *,
    in_pairs: Sequence[LoraPair] = (),
) -> Memory:
    """Memory of a training run, without activations.

    Args:
        base: bytes of the base weights.
        adapter: bytes of the adapter's weights; 0 without an adapter.
        trained: bytes of all weights that are trained.
        pairs: layers that ScaLoRA rescales; none for other methods.
        merge: where their remainders go, any but ``"auto"``.
        remainder_rank: columns that a factored remainder keeps.
        in_pairs: layers whose factors `scalora.PairAdamW` steps; none with another optimizer.
    """
    by_adam = trained - sum(pair.lora_A.nbytes + pair.lora_B.nbytes for pair in in_pairs)
    return Memory(
        base=base,
        adapter=adapter,
        gradients=trained,
        optimizer=_MOMENTS * by_adam + sum(map(_bytes_of_pair_state, in_pairs)),
        remainder=sum(_bytes_of_remainder(pair, merge, remainder_rank) for pair in pairs),
        scratch=max(map(_bytes_of_scratch, by_shape(list(pairs))), default=0),
    )


def pairs_over_quantised(model: nn.Module, quantised: set[nn.Module]) -> list[LoraPair]:
    """The LoRA pairs of a model in full precision, as they would be if some of its layers were quantised.

    Args:
        model: the adapted model.
        quantised: the layers of the base that would be quantised.

    Raises:
        UnsupportedLayerError: a module is not supported.
    """
    pairs = find_lora_pairs(model, all_shapes=True)
    return [replace(pair, quantised=pair.layer.get_base_layer() in quantised) for pair in pairs]


def quantisable_layers(base: PreTrainedModel) -> set[nn.Module]:
    """The layers that bitsandbytes would quantise: all linear layers except the output head.

    Args:
        base: the model.
    """
    return {layer for layer in base.modules() if isinstance(layer, LINEAR)} - {base.get_output_embeddings()}


def bytes_of_base(base: nn.Module, quantised: set[nn.Module], kind: str | None) -> int:
    """Bytes of a model's weights, some of which are quantised.

    Args:
        base: the model, with all of its weights in full precision.
        quantised: the layers of it whose weights are quantised.
        kind: ``"nf4"`` or ``"int8"``; None if nothing is quantised.
    """
    weights = [layer.get_parameter("weight") for layer in quantised]
    packed = [weight.numel() for weight in weights]
    whole = sum(p.nbytes for p in base.parameters()) - sum(weight.nbytes for weight in weights)
    if kind == "nf4":
        return whole + sum(math.ceil(entries / 2) + _SINGLE * math.ceil(entries / _NF4_BLOCK) for entries in packed)
    # Each row of an int8 weight has a scale as well, too little to count.
    return whole + sum(packed)


def _bytes_of_remainder(pair: LoraPair, merge: Merge, remainder_rank: int) -> int:
    m, n, r = pair.m, pair.n, pair.r
    if merge == "factored":
        # Before a compression, which comes when there are more columns than twice the rank.
        return _SINGLE * pair.experts * (m + n) * (2 * remainder_rank + r)
    return bytes_beside(merge, pair.weight.dtype) * pair.experts * m * n


def _bytes_of_pair_state(pair: LoraPair) -> int:
    """First moments, as the factors, and what FSDP2 does not split."""
    return pair.lora_A.nbytes + pair.lora_B.nbytes + bytes_of_second_moments(pair)


def bytes_of_second_moments(pair: LoraPair) -> int:
    """Bytes of what `scalora.PairAdamW` has of a layer in every process: row weights, and r × r matrices in float64.

    Args:
        pair: the layer.
    """
    row_weights = (pair.m + pair.n) * pair.lora_A.element_size()
    return pair.experts * (row_weights + 2 * _DOUBLE * pair.r**2)


def _bytes_of_scratch(stack: list[LoraPair]) -> int:
    """A, G·B, B and GᵀA of layers of one shape, stacked in float32; in float64 too the first two, then the others."""
    m, n, r = stack[0].m, stack[0].n, stack[0].r
    return sum(pair.experts for pair in stack) * 2 * r * ((m + n) * _SINGLE + max(m, n) * _DOUBLE)
