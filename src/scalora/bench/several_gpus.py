"""What each of several GPUs holds and receives in training, from the shapes of the layers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import nn

from scalora.bench.floor import Work
from scalora.bench.settings import Parallel
from scalora.config import Merge
from scalora.model.adapters import LoraPair, by_rank, by_shape
from scalora.model.memory import Memory
from scalora.parallel import buckets, runs
from scalora.parallel.buckets import alike, gathered_of
from scalora.parallel.layout import in_buckets
from scalora.parallel.traffic import (
    Collective,
    gathered_by_zero,
    most_of_layer,
    of_gather,
    received,
    rescale_of_shards,
    rescale_of_zero,
    training_step,
)

_SHARDS_WEIGHTS = ("fsdp2", "zero3")

# Bytes per entry of an adapter, which is float32.
_SINGLE = 4


@dataclass(frozen=True)
class GpuMemory(Memory):
    """Bytes of memory of one GPU of several.

    Attributes:
        layers: whole weights, gathered to compute with: those outside the blocks, one block, and the next one.
        gathered: what a rescale gathers: two buckets, or with ZeRO one and what is put together of it.
    """

    layers: int = 0
    gathered: int = 0

    @property
    def lora(self) -> int:
        """Total of LoRA."""
        return super().lora + self.layers

    @property
    def scalora(self) -> int:
        """Total of ScaLoRA."""
        return super().scalora + self.gathered


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU receives.

    Attributes:
        rescale: for a rescale.
        step: for a step of LoRA.
    """

    rescale: float
    step: float

    def share(self, interval: int) -> float:
        """What rescales add to the traffic of a step, as a fraction of it.

        Args:
            interval: steps between rescales.
        """
        return self.rescale / interval / self.step if self.step else 0.0


def bytes_of_units(base: nn.Module) -> tuple[int, int]:
    """Bytes of a model's largest block, such as a decoder layer, and of the weights outside of the blocks.

    Args:
        base: the model, without an adapter.
    """
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
    blocks = max((list(map(_bytes, blocks)) for blocks in lists), key=sum, default=[])
    return max(blocks, default=0), _bytes(base) - sum(blocks)


def rescale_collectives(pairs: list[LoraPair], merge: Merge, parallel: Parallel, processes: int) -> list[Collective]:
    """The collectives of a rescale by columns.

    Args:
        pairs: the layers, not sharded.
        merge: where their remainders go.
        parallel: how they are trained.
        processes: how many processes there are.
    """
    if parallel == "ddp":
        return []
    if parallel != "fsdp2":
        together = [
            bucket
            for of_rank in by_rank(pairs)
            for bucket in in_buckets(by_shape(of_rank), _gathered_by_zero, runs.BUCKET)
        ]
        return rescale_of_zero(
            [[_gathered_by_zero(pair) for of_shape in bucket for pair in of_shape] for bucket in together]
        )

    def matrices(pair: LoraPair) -> list[tuple[int, int]]:
        return gathered_of(pair, whole_B=pair.transposed or merge == "factored")

    together = in_buckets(
        alike(pairs, lambda pair: pair.transposed),
        lambda pair: _SINGLE * of_gather(processes, matrices(pair), most_of_layer(matrices(pair)))[1],
        buckets.BUCKET,
    )
    return rescale_of_shards(
        processes, [[(pair.r, matrices(pair)) for of_shape in bucket for pair in of_shape] for bucket in together]
    )


def traffic(
    pairs: list[LoraPair], merge: Merge, parallel: Parallel, processes: int, *, base: int, adapter: int
) -> Traffic:
    """Bytes that one GPU receives.

    Args:
        pairs: the layers, not sharded.
        merge: where their remainders go.
        parallel: how they are trained.
        processes: the number of GPUs.
        base: bytes of the base weights.
        adapter: bytes of the adapter.
    """
    return Traffic(
        received(rescale_collectives(pairs, merge, parallel, processes), processes),
        received(training_step(parallel, base, adapter), processes),
    )


def memory_of_one(
    whole: Memory,
    units: tuple[int, int],
    gathered: Sequence[Collective],
    merge: Merge,
    parallel: Parallel,
    gpus: int,
    *,
    undivided: int = 0,
) -> GpuMemory:
    """Memory of one GPU of several.

    Args:
        whole: that of a single GPU.
        units: what `bytes_of_units` finds.
        gathered: the collectives of a rescale.
        merge: where remainders go.
        parallel: how the model is trained.
        gpus: how many GPUs there are.
        undivided: bytes of the optimizer's state that each GPU has, however many there are.
    """
    shards = parallel in _SHARDS_WEIGHTS
    split = {
        "base": shards,
        "adapter": shards,
        "gradients": shards or parallel == "zero2",
        "optimizer": parallel != "ddp",
        "remainder": shards and merge != "factored",
        "scratch": parallel == "fsdp2",
    }
    counts = asdict(whole) | {"optimizer": whole.optimizer - undivided}
    parts = {name: math.ceil(count / gpus) if split[name] else count for name, count in counts.items()}
    parts["optimizer"] += undivided
    if parallel.startswith("zero"):
        parts["optimizer"] += math.ceil(whole.adapter / gpus)  # DeepSpeed's own copy of what it trains
    block, outside = units
    return GpuMemory(
        **parts,
        layers=outside + 2 * block if shards else 0,
        gathered=2 * max((collective.bytes for collective in gathered), default=0),
    )


def work_of_one(rescale: Mapping[str, Work], merge: Merge, parallel: Parallel, gpus: int) -> dict[str, Work]:
    """The part of a rescale's work that one GPU of several has: its rows of everything but of the solve.

    Args:
        rescale: all of the work, by part.
        merge: where remainders go. Factored ones are whole on every GPU.
        parallel: how the model is trained.
        gpus: how many GPUs there are.
    """
    whole = {"solve", "merge"} if merge == "factored" else {"solve"}
    if parallel not in _SHARDS_WEIGHTS:
        return dict(rescale)
    return {
        part: work if part in whole else Work(work.bytes / gpus, work.flops / gpus) for part, work in rescale.items()
    }


def _gathered_by_zero(pair: LoraPair) -> int:
    return gathered_by_zero(pair.m, pair.n, pair.r)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
