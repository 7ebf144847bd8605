"""Where the remainder of a rescale goes, ``Σ A·diag(c)·Bᵀ`` with ``c = s·(1 − α⊙β)``: tensors only.

Two places. `DenseRemainder` adds it to the base weight in place, the paper's way: no memory, no time in the forward
pass, but the base weight changes and must be able to take it. `FactoredRemainder` keeps it beside the untouched base as
a frozen low-rank product that the forward pass adds.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from scalora.lowrank import factors_of_product, rank_for_tolerance

Merge = Literal["auto", "dense", "factored"]

# Bits of a half-precision format's significand, the implicit one included.
_SIGNIFICAND = {torch.bfloat16: 8, torch.float16: 11}

# Rows of a half-precision weight are merged in blocks of about this many entries, so that the float32 copy that the
# sum is rounded from stays at 4 MiB however large the weight is.
_BLOCK = 1 << 20

# Singular values that together carry less than this share of the product are float32 noise: twice its rounding.
_NEGLIGIBLE = 1e-7


class DenseRemainder(nn.Module):
    """Adds to the base weight in place. In float32 and float64 that is all.

    In bfloat16 and float16 a weight that is rounded at every merge random-walks away from what was learned. So the
    rounding error of each entry is kept as a 16-bit fraction of its rounding interval (`low`, 2 bytes an entry), added
    back before the next merge, and rounded off again after it: the pair carries float32's 24 bits, and the weight
    itself is never more than one rounding away from that.

    Args:
        weight: the base weight, (m, n), or (n, m) when `transposed`.
        transposed: whether it is stored transposed (Conv1D, embeddings).
    """

    low: Int[Tensor, "rows columns"] | None

    def __init__(self, weight: Tensor, *, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        low = torch.zeros_like(weight, dtype=torch.int16) if weight.dtype in _SIGNIFICAND else None
        self.register_buffer("low", low)

    @torch.no_grad()
    def add(
        self,
        weight: Tensor,
        A: Float[Tensor, "m r"],
        B: Float[Tensor, "n r"],
        coefficients: Float[Tensor, " r"],
    ) -> None:
        """Add ``A·diag(coefficients)·Bᵀ`` to `weight` in place, without a temporary of its size.

        Args:
            weight: the base weight, always the same one.
            A: (m, r), in the adapter's dtype.
            B: (n, r).
            coefficients: columns with exactly 0 contribute exactly nothing, whatever A and B hold.
        """
        left, right = _weighted(A, B, coefficients)
        if self.transposed:
            left, right = right, left
        if self.low is None:
            weight.addmm_(left.to(weight.dtype), right.to(weight.dtype).mT)
            return
        rows = max(1, _BLOCK // weight.shape[1])
        for start in range(0, len(weight), rows):
            block = slice(start, start + rows)
            exact = _join(weight[block], self.low[block]).addmm_(left[block].float(), right.float().mT)
            weight[block] = exact
            self.low[block] = _fraction(exact, weight[block])

    def exact(self, weight: Tensor) -> Tensor:
        """The weight with all the bits that are kept: float32 for half precision, else the weight itself."""
        return weight if self.low is None else _join(weight, self.low)


def _interval(rounded: Tensor) -> Tensor:
    """Half the spacing of the format at each entry, as float32: the largest error that rounding to it can make."""
    finfo = torch.finfo(rounded.dtype)
    smallest = torch.frexp(torch.tensor(finfo.tiny)).exponent.to(rounded.device)
    exponent = torch.maximum(torch.frexp(rounded.float()).exponent, smallest)
    return torch.ldexp(torch.ones((), device=rounded.device), exponent - _SIGNIFICAND[rounded.dtype] - 1)


def _fraction(exact: Tensor, rounded: Tensor) -> Tensor:
    """The rounding error as a fraction of the interval, in 1/32767; 0 where the weight is not finite."""
    fraction = ((exact - rounded.float()) / _interval(rounded) * 32767).round()
    return fraction.nan_to_num(0, 0, 0).clamp(-32767, 32767).to(torch.int16)


def _join(rounded: Tensor, low: Tensor) -> Tensor:
    return rounded.float() + low.float() / 32767 * _interval(rounded)


class FactoredRemainder(nn.Module):
    """Keeps the sum as ``left @ right.T`` in the adapter's dtype and never touches the base weight.

    Columns are appended at every rescale. When there are more than twice `max_rank` of them, the product is compressed
    to its `max_rank` largest singular values (thin QR and a small SVD, never m × n); what that leaves out is counted
    in `discarded`. A product that needs fewer columns keeps fewer, and then nothing is lost.

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
    def add(
        self,
        weight: Tensor,
        A: Float[Tensor, "m r"],
        B: Float[Tensor, "n r"],
        coefficients: Float[Tensor, " r"],
    ) -> None:
        """Add ``A·diag(coefficients)·Bᵀ`` to the product; arguments as for `DenseRemainder.add`, `weight` unused."""
        left, right = _weighted(A, B, coefficients)
        self.left = torch.cat([self.left, left], dim=1)
        self.right = torch.cat([self.right, right], dim=1)
        if self.left.shape[1] > 2 * self.max_rank:
            self.compress()

    @torch.no_grad()
    def compress(self) -> None:
        """Reduce the product to at most `max_rank` columns, balanced between the two factors."""
        factors = factors_of_product(self.left, self.right)
        kept = factors.truncated(min(rank_for_tolerance(factors, _NEGLIGIBLE), self.max_rank))
        self.discarded += kept.discarded()
        root = kept.values.sqrt()
        self.left, self.right = (kept.left * root).to(self.left.dtype), (kept.right * root).to(self.right.dtype)

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


def _weighted(A: Tensor, B: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    left = torch.where(coefficients == 0, 0, A * coefficients.to(A.dtype))
    return left, torch.where(coefficients == 0, 0, B)
