"""The floor of a rescale: bytes that must move and arithmetic that must be done, from the shapes of the layers alone.

Everything is read and written once: the factors, their gradients and the optimizer's moments, and the weights where the
remainder is merged into them. What a real rescale takes can be set beside it (`scalora bench`), and what a model too
large for the machine at hand would take can be read off it (`scalora estimate`).
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

from scalora.model.adapters import LoraPair
from scalora.rescale.remainder import HALF


class Work(NamedTuple):
    """What a piece of computation takes at the least.

    Attributes:
        bytes: read and written.
        flops: additions and multiplications.
    """

    bytes: float
    flops: float

    def seconds(self, bandwidth: float, rate: float) -> float:
        """The least time on a machine: whichever of the two it waits for longer.

        Args:
            bandwidth: bytes per second.
            rate: floating-point operations per second.
        """
        return max(self.bytes / bandwidth, self.flops / rate)

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        """Both, one after the other."""
        return Work(self.bytes + other.bytes, self.flops + other.flops)


class RescaleWork(NamedTuple):
    """A rescale of one layer, by its parts.

    Attributes:
        grams: the normal equations, from A, B, G·B and Gᵀ·A.
        solve: the factors, from the normal equations.
        merge: the remainder, into the weight or beside it.
        transport: the factors onto A, B, their gradients and moments.
    """

    grams: Work
    solve: Work
    merge: Work
    transport: Work

    def __add__(self, other: RescaleWork) -> RescaleWork:  # type: ignore[override]
        """Both layers' together."""
        return RescaleWork(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def seconds(self, bandwidth: float, rate: float) -> float:
        """The least time on a machine, one part after the other; see `Work.seconds`."""
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
    """What one rescale of a layer takes.

    Args:
        m: out_features.
        n: in_features.
        rank: r.
        weight_bytes: of one entry of the weight, with what is kept beside it for a merge (4 for float32 and for
            bfloat16 with its lower half); of no matter with a factored remainder.
        adapter_bytes: of one entry of the adapter.
        moments: entries of optimizer state for each entry of the adapter: 2 for Adam.
        remainder_rank: of a factored remainder, whose compressions are spread over the rescales between them; None for
            a dense one.
    """
    adapter = (m + n) * rank
    grams = Work(2 * adapter * adapter_bytes, 2 * (m + n) * (2 * rank) ** 2)
    # A Cholesky factorisation and two solutions of 2r equations in float64.
    solve = Work(8 * (2 * rank) ** 2, (2 * rank) ** 3 / 3 + 4 * (2 * rank) ** 2)
    transport = Work(2 * (2 + moments) * adapter * adapter_bytes, (2 + moments) * adapter)
    if remainder_rank is None:
        merge = Work(2 * m * n * weight_bytes + adapter * adapter_bytes, 2 * m * n * rank)
    else:
        # Columns are appended; twice the rank of them are compressed to the rank by two Grams (2·m·k²), the
        # eigenvectors of two k × k matrices (about 9·k³ each), three products of such, and two of m × k with k × k/2.
        k = 2 * remainder_rank
        compression = Work(2 * (m + n) * k * adapter_bytes, 3 * (m + n) * k**2 + (2 * 9 + 3 * 2) * k**3)
        appended = Work(2 * adapter * adapter_bytes, adapter)
        share = rank / remainder_rank
        merge = appended + Work(share * compression.bytes, share * compression.flops)
    return RescaleWork(grams, solve, merge, transport)


def rescale_work_of(pairs: list[LoraPair], remainder_rank: int | None) -> RescaleWork:
    """`rescale_work` of all layers of a model together, with Adam's two moments.

    Args:
        pairs: at least one.
        remainder_rank: of their factored remainders; None for dense ones, which keep 2 bytes beside an entry of a
            half-precision weight.
    """
    return reduce(
        RescaleWork.__add__,
        (
            rescale_work(
                pair.m,
                pair.n,
                pair.r,
                weight_bytes=pair.weight.element_size() + (2 if pair.weight.dtype in HALF else 0),
                remainder_rank=remainder_rank,
            )
            for pair in pairs
        ),
    )
