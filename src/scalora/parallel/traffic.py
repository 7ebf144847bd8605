"""What processes send: the collectives of a rescale, and those of a training step, in bytes.

A process of p receives the share f = (p − 1)/p of what a gather or a scattered sum leaves in all of them together, and
twice that of a sum that all of them get.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

# Of inner products, which are summed in float64, and of an adapter, which is float32.
_DOUBLE, _SINGLE = 8, 4


class Collective(NamedTuple):
    """One collective.

    Attributes:
        kind: ``"gather"``: processes get the parts of all; ``"sum"``: they get the sum of all; ``"scatter"``: of the
            sum, each gets a part.
        bytes: what is gathered, or summed.
    """

    kind: Literal["gather", "sum", "scatter"]
    bytes: int

    def received(self, processes: int) -> float:
        """Bytes that each process receives, on a ring.

        Args:
            processes: how many take part.
        """
        return (2 if self.kind == "sum" else 1) * self.bytes * (processes - 1) / processes


def most_of_layer(matrices: Sequence[tuple[int, int]]) -> int:
    """How many entries a rescale gathers of a layer at most, with what is padded: four times the larger factor.

    Args:
        matrices: rows and columns of what is gathered of the layer.
    """
    return 4 * max(rows * width for rows, width in matrices)


def of_gather(processes: int, matrices: Sequence[tuple[int, int]], limit: int | None = None) -> tuple[bool, int]:
    """How matrices that are split by rows are gathered: with the least traffic, if that does not take too much memory.

    A gather pads rows to a multiple of the processes. A sum of zeros and the rows that each process has moves every
    entry twice and pads nothing, so it is less where the rows are fewer than half of the processes.

    Args:
        processes: how many have the rows.
        matrices: rows and columns of each whole matrix.
        limit: entries above which a sum takes the place of the gather. None: only traffic counts.

    Returns:
        Whether a sum takes the place of the gather; and the entries that the collective leaves in each process.
    """
    padded = sum(processes * -(-rows // processes) * width for rows, width in matrices)
    exact = sum(rows * width for rows, width in matrices)
    by_sum = padded > (2 * exact if limit is None else min(2 * exact, max(exact, limit)))
    return by_sum, exact if by_sum else padded


def rescale_of_shards(
    processes: int, buckets: Sequence[Sequence[tuple[int, Sequence[tuple[int, int]]]]], *, entry_bytes: int = _SINGLE
) -> list[Collective]:
    """The collectives of a rescale with FSDP2: two for each bucket.

    Args:
        processes: how many have rows of each matrix.
        buckets: for each layer of each bucket, its rank and the rows and columns of what is gathered of it.
        entry_bytes: bytes per entry of what is gathered.
    """
    found = []
    for layers in buckets:
        limit = sum(most_of_layer(matrices) for _, matrices in layers)
        by_sum, entries = of_gather(processes, [matrix for _, matrices in layers for matrix in matrices], limit)
        found.append(Collective("sum" if by_sum else "gather", entry_bytes * entries))
        # Two Gram matrices of the rank's double order, and whether there is a gradient.
        found.append(Collective("sum", sum(_DOUBLE * (2 * (2 * rank) ** 2 + 1) for rank, _ in layers)))
    return found


def rescale_of_zero(buckets: Sequence[Sequence[int]]) -> list[Collective]:
    """The collectives of a rescale with ZeRO, one for each bucket, if its processes have runs of equal length of it.

    If they have not, a gather is padded, to at most twice its size; where it would be longer, a sum of zeros and runs
    takes its place, which sends every entry twice.

    Args:
        buckets: for each layer of each bucket, what `gathered_by_zero` says.
    """
    return [Collective("gather", sum(layers)) for layers in buckets]


def gathered_by_zero(outputs: int, inputs: int, rank: int, *, entry_bytes: int = _SINGLE) -> int:
    """Bytes that ZeRO's processes gather of a layer, of whose factors and gradients each has a run of entries.

    Args:
        outputs: outputs of the layer.
        inputs: its inputs.
        rank: its rank.
        entry_bytes: bytes per entry of what is gathered.
    """
    return 2 * entry_bytes * rank * (outputs + inputs)


def training_step(parallel: str, base: int, adapter: int) -> list[Collective]:
    """The collectives of a training step of LoRA, added up by kind.

    Args:
        parallel: how it is trained: ``"ddp"``, ``"fsdp2"``, ``"zero1"``, ``"zero2"`` or ``"zero3"``.
        base: bytes of the base weights.
        adapter: bytes of the adapter, and of its gradients.
    """
    if parallel == "ddp":
        return [Collective("sum", adapter)]
    if parallel in ("zero1", "zero2"):
        return [Collective("scatter", adapter), Collective("gather", adapter)]
    # Weights are gathered for the forward pass, and once more for the backward pass.
    return [Collective("gather", 2 * (base + adapter)), Collective("scatter", adapter)]


def received(collectives: Sequence[Collective], processes: int) -> float:
    """Bytes that each process receives.

    Args:
        collectives: the collectives.
        processes: how many take part in each.
    """
    return sum((collective.received(processes) for collective in collectives), 0.0)
