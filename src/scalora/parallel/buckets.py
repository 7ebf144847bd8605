"""Which layers of a sharded model are rescaled together, so that what they gather fits in memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from scalora.model.adapters import LoraPair, by_rank, by_shape
from scalora.parallel.layout import Shapes, in_buckets
from scalora.parallel.shards import axis_key, axis_of
from scalora.parallel.traffic import most_of_layer, of_gather
from scalora.rescale.optimizers import LINEAR, Kind
from scalora.rescale.remainder import DenseRemainder

BUCKET = 1 << 28
"""Bytes that a collective gathers at once. Two buckets are in memory at a time: what is rescaled, and what is next."""

Matrices = list[tuple[int, int]]
"""Rows and columns of what is gathered of one layer."""


def gathered_of(pair: LoraPair, *, whole_B: bool, moments: int = 0) -> Matrices:
    """What is gathered of a layer for a rescale.

    Args:
        pair: the layer.
        whole_B: whether all of lora_B is needed, because a process has not the rows of it that go with its rows of W.
        moments: how many statistics of lora_A a rescale mixes; 0 if it multiplies columns.
    """
    return [(pair.r, pair.n)] * (2 + moments) + ([(pair.m, pair.r)] if whole_B else [])


def buckets_of_shards(pairs: list[LoraPair], kinds: Mapping[str, Kind], *, by_matrices: bool) -> list[Shapes]:
    """The layers that are rescaled together: on the same processes, and not too many bytes.

    Args:
        pairs: the LoRA pairs of one model, with remainders.
        kinds: how each entry of the optimizer's state depends on the gradients.
        by_matrices: whether rescales are by matrices, which mix statistics that depend on them linearly.
    """
    moments = sum(kind == LINEAR for kind in kinds.values()) if by_matrices else 0

    def size(pair: LoraPair) -> int:
        axis = axis_of(pair.lora_A)
        matrices = gathered_of(pair, whole_B=not has_its_rows(pair), moments=moments)
        if axis is None:
            return 0
        return pair.lora_A.element_size() * of_gather(axis.size, matrices, most_of_layer(matrices))[1]

    by_axis: dict[Any, list[LoraPair]] = defaultdict(list)
    for pair in pairs:
        by_axis[axis_key(pair.lora_A)].append(pair)
    return [bucket for of_axis in by_axis.values() for bucket in in_buckets(alike(of_axis, _kind), size, BUCKET)]


def has_its_rows(pair: LoraPair) -> bool:
    """Whether a process has the rows of lora_B that belong to its rows of the weight.

    Args:
        pair: the layer.
    """
    upright = isinstance(pair.remainder, DenseRemainder) and not pair.transposed
    return axis_key(pair.lora_B) is None or (upright and axis_key(pair.weight) == axis_key(pair.lora_B))


def alike(pairs: list[LoraPair], kind: Callable[[LoraPair], Any]) -> Shapes:
    """Layers that are treated alike, those of one rank together.

    Args:
        pairs: the LoRA pairs of one model.
        kind: what else than rank and shape they must have in common.
    """
    shapes = []
    for of_rank in by_rank(pairs):
        of_kind: dict[Any, list[LoraPair]] = defaultdict(list)
        for pair in of_rank:
            of_kind[kind(pair)].append(pair)
        shapes += [shape for some in of_kind.values() for shape in by_shape(some)]
    return shapes


def _kind(pair: LoraPair) -> Any:
    return pair.transposed, axis_key(pair.weight), type(pair.remainder)
