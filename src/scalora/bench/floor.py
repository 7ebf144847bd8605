"""The floor of a rescale: a lower bound on its cost from the shapes of the layers alone, in bytes moved and operations.

Every tensor is read and written once: the factors, their gradients and the optimizer's moments, and the weights where
the remainder is merged into them. `scalora bench` compares measured rescales with the floor, and `scalora estimate`
takes it as the cost of a rescale in models too large for the machine at hand.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

from scalora.config import Merge
from scalora.model.adapters import LoraPair
from scalora.model.placement import bytes_beside, kind_of
from scalora.rescale.remainder import FactoredRemainder
from scalora.rescaling import PARTS


class Work(NamedTuple):
    """Lower bound on the cost of a computation.

    Attributes:
        bytes: bytes read and written.
        flops: floating-point additions and multiplications.
    """

    bytes: float
    flops: float

    def seconds(self, bandwidth: float, rate: float) -> float:
        """Lower bound on the time: that of memory or of arithmetic, whichever is longer.

        Args:
            bandwidth: memory bandwidth in bytes per second.
            rate: floating-point operations per second.
        """
        return max(self.bytes / bandwidth, self.flops / rate)

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        """The work of both.

        Args:
            other: the work to add.
        """
        return Work(self.bytes + other.bytes, self.flops + other.flops)


class RescaleWork(NamedTuple):
    """Lower bound on the cost of a rescale, by part.

    Attributes:
        grams: computing the normal equations' matrices from A, B, G·B and Gᵀ·A.
        solve: solving the normal equations for the scaling factors.
        merge: adding the remainder to the weight, or appending it to a factored remainder.
        transport: multiplying A, B, their gradients and moments by the scaling factors.
    """

    grams: Work
    solve: Work
    merge: Work
    transport: Work

    def __add__(self, other: RescaleWork) -> RescaleWork:  # type: ignore[override]
        """The work of both, part by part.

        Args:
            other: the work to add, for instance that of another layer.
        """
        return RescaleWork(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def seconds(self, bandwidth: float, rate: float) -> float:
        """Lower bound on the time, with the parts one after the other.

        Args:
            bandwidth: memory bandwidth in bytes per second.
            rate: floating-point operations per second.
        """
        return sum(part.seconds(bandwidth, rate) for part in self)


def rescale_work(
    m: int,
    n: int,
    rank: int,
    *,
    weight_bytes: float,
    adapter_bytes: float = 4,
    moments: int = 2,
    remainder_rank: int | None = None,
) -> RescaleWork:
    """Lower bound on the cost of one rescale of one layer.

    Args:
        m: output features.
        n: input features.
        rank: r, the rank of the adapter.
        weight_bytes: bytes per entry of the weight, including what a merge keeps beside it: 4 for float32, and 4 for
            bfloat16 with the lower half of the float32 result. Not used with a factored remainder.
        adapter_bytes: bytes per entry of the adapter. The default is float32's.
        moments: optimizer state entries per entry of the adapter. The default is Adam's.
        remainder_rank: rank that a factored remainder is compressed to. The cost of a compression is spread over the
            rescales between two of them. None: a dense remainder, merged into the weight.
    """
    adapter = (m + n) * rank
    grams = Work(2 * adapter * adapter_bytes, 2 * (m + n) * (2 * rank) ** 2)
    # A Cholesky factorisation and two triangular solves with 2r unknowns, in float64.
    solve = Work(8 * (2 * rank) ** 2, (2 * rank) ** 3 / 3 + 4 * (2 * rank) ** 2)
    transport = Work(2 * (2 + moments) * adapter * adapter_bytes, (2 + moments) * adapter)
    if remainder_rank is None:
        merge = Work(2 * m * n * weight_bytes + adapter * adapter_bytes, 2 * m * n * rank)
    else:
        # Each rescale appends r columns. When there are k = 2·remainder_rank, they are compressed to remainder_rank by
        # two Gram matrices (2·m·k² operations), the eigenvectors of a k × k matrix (about 9·k³), a Cholesky factor,
        # triangular solves and products of k × k matrices (about 15·k³), and two products of m × k with k × k/2.
        k = 2 * remainder_rank
        compression = Work(2 * (m + n) * k * adapter_bytes, 3 * (m + n) * k**2 + (9 + 15) * k**3)
        appended = Work(2 * adapter * adapter_bytes, adapter)
        share = rank / remainder_rank
        merge = appended + Work(share * compression.bytes, share * compression.flops)
    return RescaleWork(grams, solve, merge, transport)


def rescale_work_of(pairs: list[LoraPair], merge: Merge, remainder_rank: int, *, moments: int = 2) -> RescaleWork:
    """Lower bound on the cost of one rescale of all layers of a model.

    Args:
        pairs: the layers, at least one.
        merge: where their remainders go. Dense ones keep bytes beside each entry of a half-precision weight.
        remainder_rank: rank that factored remainders are compressed to; not used for others.
        moments: statistics of the factors' shapes that the optimizer keeps; Adam has two.
    """
    return reduce(
        RescaleWork.__add__,
        (
            rescale_work(
                pair.m,
                pair.n,
                pair.r,
                weight_bytes=pair.weight.element_size() + bytes_beside(merge, pair.weight.dtype),
                moments=moments,
                remainder_rank=remainder_rank if merge == "factored" else None,
            )
            for pair in pairs
            for _ in range(pair.experts)
        ),
    )


def seconds_of_parts(pairs: list[LoraPair], bandwidth: float, rate: float, *, moments: int = 2) -> dict[str, float]:
    """Lower bounds on the seconds of a rescale, for the parts in `scalora.rescaling.PARTS`.

    The Grams count as part of the solve, as in the profiler.

    Args:
        pairs: the layers, at least one, with remainders of one kind.
        bandwidth: memory bandwidth in bytes per second.
        rate: floating-point operations per second.
        moments: as in `rescale_work_of`.
    """
    remainder = pairs[0].remainder
    kept = remainder.max_rank if isinstance(remainder, FactoredRemainder) else 0
    work = rescale_work_of(pairs, kind_of(remainder), kept, moments=moments)
    solve = work.grams.seconds(bandwidth, rate) + work.solve.seconds(bandwidth, rate)
    others = (part.seconds(bandwidth, rate) for part in (work.merge, work.transport))
    return dict(zip(PARTS, (solve, *others), strict=True))
