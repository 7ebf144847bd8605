"""Where the remainder of a rescale goes, ``Σ A·diag(c)·Bᵀ`` with ``c = s·(1 − α⊙β)``: tensors only.

Two places. `DenseRemainder` adds it to the base weight in place, the paper's way: no memory, no time in the forward
pass, but the base weight changes and must be able to take it. `FactoredRemainder` keeps it beside the untouched base as
a frozen low-rank product that the forward pass adds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from scalora.maths.lowrank import compressed_products

HALF = (torch.bfloat16, torch.float16)
"""The dtypes that a merge would wear down without the bits that `DenseRemainder` keeps beside them."""

# Bits of float16's significand, the implicit one included.
_SIGNIFICAND = 11

# Rows of a half-precision weight are merged in blocks of about this many entries: the float32 copy that the sum is
# rounded from stays at 64 MiB however large the weight is, and at 4 on a CPU, whose caches it should fit.
_BLOCK, _BLOCK_ON_CPU = 1 << 24, 1 << 20

# Singular values that together carry less than this share of the product are float32 noise: twice its rounding.
_NEGLIGIBLE = 1e-7


class DenseRemainder(nn.Module):
    """Adds to the base weight in place. In float32 and float64 that is all.

    In bfloat16 and float16 a weight that is rounded at every merge random-walks away from what was learned. So the
    rounding error of each entry is kept in 16 bits (`rounded_off`, 2 bytes an entry), added back before the next merge,
    and rounded off again after it: the pair carries float32's 24 bits, and the weight itself is never more than one
    rounding away from that. For bfloat16 they are the lower half of the float32 itself ("Split SGD" of Intel's
    extension for PyTorch); for float16, whose exponent is shorter, they are a fraction of the rounding interval.

    Args:
        weight: the base weight, (m, n), or (n, m) when `transposed`.
        transposed: whether it is stored transposed (Conv1D, embeddings).
    """

    rounded_off: Int[Tensor, "rows columns"] | None

    def __init__(self, weight: Tensor, *, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        rounded_off = torch.zeros_like(weight, dtype=torch.int16) if weight.dtype in HALF else None
        self.register_buffer("rounded_off", rounded_off)

    @torch.no_grad()
    def add(self, weight: Tensor, left: Float[Tensor, "m r"], right: Float[Tensor, "n r"]) -> None:
        """Add ``left @ right.T`` to `weight` in place, without a temporary of its size.

        Args:
            weight: the base weight, always the same one.
            left: (m, r), in the adapter's dtype; see `scale_columns`.
            right: (n, r).
        """
        if self.transposed:
            left, right = right, left
        if self.rounded_off is None:
            weight.addmm_(left.to(weight.dtype), right.to(weight.dtype).mT)
            return
        left, right = left.float(), right.float().mT
        rows = max(1, (_BLOCK_ON_CPU if weight.is_cpu else _BLOCK) // weight.shape[1])
        for start in range(0, len(weight), rows):
            block, low = weight[start : start + rows], self.rounded_off[start : start + rows]
            _split(_join(block, low).addmm_(left[start : start + rows], right), block, low)

    def exact(self, weight: Tensor) -> Tensor:
        """The weight with all the bits that are kept: float32 for half precision, else the weight itself."""
        return weight if self.rounded_off is None else _join(weight, self.rounded_off)


def _join(rounded: Tensor, low: Tensor) -> Tensor:
    """The float32 numbers that `_split` was given: exactly for bfloat16, to 2⁻²⁶ relative for float16."""
    exact = rounded.float()
    if rounded.dtype == torch.bfloat16:
        # bfloat16 is the upper half of a float32: its bits and those that were rounded off are one number's.
        exact.view(torch.int32).add_(low)
        return exact
    return exact + low.float() / 32767 * _interval(rounded)


def _split(exact: Tensor, rounded: Tensor, low: Tensor) -> None:
    """Write float32 numbers, which are used up, as half-precision ones and what their rounding leaves out."""
    if rounded.dtype == torch.bfloat16:
        # The lower half, taken for a signed number, is what the float32 is over or short of the nearest bfloat16.
        bits = exact.view(torch.int32)
        low.copy_(bits)
        rounded.view(torch.int16).copy_(bits.add_(1 << 15).bitwise_right_shift_(16))
        return
    rounded.copy_(exact)
    fraction = ((exact - rounded.float()) / _interval(rounded) * 32767).round()
    low.copy_(fraction.nan_to_num(0, 0, 0).clamp(-32767, 32767))


def _interval(rounded: Tensor) -> Tensor:
    """Half the spacing of float16 at each entry, as float32: the largest error that rounding to it can make."""
    smallest = torch.frexp(torch.tensor(torch.finfo(torch.float16).tiny)).exponent.to(rounded.device)
    exponent = torch.maximum(torch.frexp(rounded.float()).exponent, smallest)
    return torch.ldexp(torch.ones((), device=rounded.device).expand(exponent.shape), exponent - _SIGNIFICAND - 1)


class FactoredRemainder(nn.Module):
    """Keeps the sum as ``left @ right.T`` in the adapter's dtype and never touches the base weight.

    Columns are appended at every rescale. When there are more than twice `max_rank` of them, the product is compressed
    to its `max_rank` largest singular values (from Gram matrices of its columns, never m × n); what that leaves out is
    counted in `discarded`. A product that needs fewer columns keeps fewer, and then nothing is lost.

    Args:
        m: rows of the weight (out_features).
        n: columns of the weight (in_features).
        max_rank: columns kept by a compression.
        dtype: of the adapter, float32 or better.
        device: of the adapter.
    """

    left: Float[Tensor, "m k"]
    right: Float[Tensor, "n k"]
    discarded: Float[Tensor, ""]

    def __init__(self, m: int, n: int, max_rank: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.max_rank = max_rank
        self.register_buffer("left", torch.zeros(m, 0, dtype=dtype, device=device))
        self.register_buffer("right", torch.zeros(n, 0, dtype=dtype, device=device))
        self.register_buffer("discarded", torch.zeros((), dtype=dtype, device=device))

    @torch.no_grad()
    def add(self, weight: Tensor, left: Float[Tensor, "m r"], right: Float[Tensor, "n r"]) -> None:
        """Add ``left @ right.T`` to the product; arguments as for `DenseRemainder.add`, `weight` unused."""
        self.append(left, right)
        if self.is_full:
            compress([self])

    def append(self, left: Float[Tensor, "m r"], right: Float[Tensor, "n r"]) -> None:
        """As `add`, with as many columns more."""
        self.left = torch.cat([self.left, left], dim=1)
        self.right = torch.cat([self.right, right], dim=1)

    @property
    def is_full(self) -> bool:
        """Whether it has more columns than it should."""
        return self.left.shape[1] > 2 * self.max_rank

    def energy(self) -> Float[Tensor, ""]:
        """Squared Frobenius norm of the product, from k × k Grams."""
        return ((self.left.mT @ self.left) * (self.right.mT @ self.right)).sum()

    def dense(self) -> Float[Tensor, "m n"]:
        """The product itself, for merging at the end."""
        return self.left @ self.right.mT

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A checkpoint has as many columns as it had when it was written.
        for name in ("left", "right"):
            if (saved := state_dict.get(prefix + name)) is not None:
                setattr(self, name, getattr(self, name).new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


Remainder = DenseRemainder | FactoredRemainder

REMAINDER_BUFFERS = ("rounded_off", "left", "right", "discarded")
"""The names of their buffers."""


@torch.no_grad()
def add_to_all(
    remainders: Sequence[Remainder], weights: Sequence[Tensor], lefts: Sequence[Tensor], rights: Sequence[Tensor]
) -> None:
    """`DenseRemainder.add` and `FactoredRemainder.add` for some layers of one device, with what they can share.

    Args:
        remainders: of the layers.
        weights: their base weights.
        lefts: (m, r) each.
        rights: (n, r) each.
    """
    for remainder, weight, left, right in zip(remainders, weights, lefts, rights, strict=True):
        if isinstance(remainder, FactoredRemainder):
            remainder.append(left, right)
        else:
            remainder.add(weight, left, right)
    compress([r for r in remainders if isinstance(r, FactoredRemainder) and r.is_full])


@torch.no_grad()
def compress(remainders: Sequence[FactoredRemainder]) -> None:
    """Reduce products to at most `max_rank` columns each, balanced between the two factors."""
    alike = defaultdict(list)
    for remainder in remainders:
        alike[remainder.left.shape[1], remainder.max_rank].append(remainder)
    for (_, max_rank), group in alike.items():
        smaller = compressed_products([(r.left, r.right) for r in group], rtol=_NEGLIGIBLE, max_rank=max_rank)
        for remainder, (left, right, discarded) in zip(group, smaller, strict=True):
            remainder.left, remainder.right = left, right
            remainder.discarded += discarded


def scale_columns(
    A: Float[Tensor, "*layers m r"], B: Float[Tensor, "*layers n r"], coefficients: Float[Tensor, "*layers r"]
) -> tuple[Float[Tensor, "*layers m r"], Float[Tensor, "*layers n r"]]:
    """``A·diag(coefficients)`` and B: the factors of what a rescale moves into the remainder.

    Args:
        A: (…, m, r).
        B: (…, n, r).
        coefficients: (…, r); columns with exactly 0 become exactly 0 in both, whatever A and B hold.
    """
    coefficients = coefficients[..., None, :]
    left = torch.where(coefficients == 0, 0, A * coefficients.to(A.dtype))
    return left, torch.where(coefficients == 0, 0, B)
