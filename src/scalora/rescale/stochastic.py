"""Dense remainders without memory: a half-precision weight is rounded stochastically, up or down by chance.

The chance of rounding up is the distance from the lower neighbour, so that the mean over many merges is the exact sum.
The random numbers depend on the layer's name, the optimizer step, the row and the column alone: a run that is resumed,
all processes of a run, and all devices draw the same ones.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scalora.rescale.remainder import DenseRemainder

# Of MurmurHash3's finaliser, which maps 32 bits one to one to well-mixed ones, and the golden ratio's 32 bits.
_FIRST, _SECOND, _GOLDEN = 0x85EBCA6B, 0xC2B2AE35, 0x9E3779B9

_MASK = 0xFFFFFFFF


class StochasticRemainder(DenseRemainder):
    """Adds remainders to the base weight in place, and rounds a half-precision one stochastically to its dtype.

    For a float32 or float64 weight it is a `DenseRemainder`.

    Args:
        weight: the base weight, (m, n), or (n, m) if `transposed`; not quantised.
        transposed: whether the base weight is stored transposed.
        name: the layer's name, which distinguishes its random numbers from other layers'.

    Attributes:
        name_hash: 32 bits of the name's hash.
        step: number of the optimizer step, which the next merge's random numbers XX
    """

    def __init__(self, weight: Tensor, *, transposed: bool, name: str) -> None:
        super().__init__(weight, transposed=transposed)
        self.name_hash = hash_of(name)
        self.step: int | Float[Tensor, ""] = 0

    def by_matrix(self, weight: Tensor, matrices: Sequence[Float[Tensor, "rows columns"]]) -> Sequence[DenseRemainder]:
        """`DenseRemainder.by_matrix`; the random numbers of each matrix are its own.

        Args:
            weight: the base weight.
            matrices: views of it.
        """
        parts = [copy.copy(self) for _ in matrices]
        for number, part in enumerate(parts):
            part.name_hash = _mixed_number(self.name_hash + number * _GOLDEN & _MASK)
        return parts

    def _no_errors_yet(self, weight: Tensor) -> None:
        """Nothing is kept beside the weight."""

    def _add_to_rows(self, weight: Tensor, part: slice, left: Tensor, right: Tensor) -> None:
        block = weight[part]
        exact = block.float().addmm_(left, right)
        block.copy_(rounded_by(exact, block, draws(self.name_hash, self.step, self.first_row + part.start, block)))


def hash_of(name: str) -> int:
    """32 bits of the hash of a layer's name.

    Args:
        name: the name.
    """
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


def on_device(step: int | Float[Tensor, ""], device: torch.device) -> Float[Tensor, ""]:
    """The number of a step as a float64 scalar on a device, for which the host does not wait.

    Args:
        step: the number.
        device: the device.
    """
    if isinstance(step, Tensor):
        return step.to(device, non_blocking=True)
    return torch.full((), step, dtype=torch.float64, device=device)


def draws(name_hash: int, step: int | Float[Tensor, ""], first_row: int, like: Tensor) -> Int[Tensor, "rows columns"]:
    """16 random bits for each entry of some rows of a weight, as int32.

    Args:
        name_hash: the hash of the layer's name.
        step: number of the optimizer step.
        first_row: where the rows begin in the weight.
        like: the rows.
    """
    rows, columns = (torch.arange(size, dtype=torch.int32, device=like.device) for size in like.shape)
    key = _mixed(_mixed(on_device(step, like.device).to(torch.int32)) ^ _signed(name_hash))
    of_rows = _mixed(rows.add_(first_row).mul_(_signed(_GOLDEN)).add_(key))
    return _mixed(of_rows[:, None] ^ columns).bitwise_right_shift_(16).bitwise_and_(0xFFFF)


def rounded_by(
    exact: Float[Tensor, "rows columns"], before: Float[Tensor, "rows columns"], draws: Int[Tensor, "rows columns"]
) -> Float[Tensor, "rows columns"]:
    """Round float32 numbers to one of their two neighbours in half precision.

    The magnitude is rounded up if its distance from the lower neighbour exceeds the drawn share of the interval:
    unbiased for bfloat16 and for float16's normal numbers, and to 2⁻¹⁶ of an interval for its subnormal ones.

    Args:
        exact: the numbers.
        before: the half-precision numbers that they were before the merge; what equals its number keeps its bits.
        draws: 16 random bits for each.
    """
    rounded = (_to_bfloat16 if before.dtype == torch.bfloat16 else _to_float16)(exact, draws)
    old = before.float()
    return torch.where((exact != old) & (old == old), rounded, before)


def _to_bfloat16(exact: Tensor, draws: Tensor) -> Tensor:
    # What a carry from the lower half does to the upper one is to round up.
    upper = (exact.view(torch.int32) + draws).bitwise_right_shift_(16)
    return upper.masked_fill_(exact.isnan(), 0x7FC0).to(torch.int16).view(torch.bfloat16)


def _to_float16(exact: Tensor, draws: Tensor) -> Tensor:
    bits = exact.view(torch.int32)
    # The exponent of float32; float16's numbers below its smallest normal one are as far apart as those from it on.
    exponent = (bits & 0x7FFFFFFF).bitwise_right_shift_(23).clamp_(min=113)
    finite = exponent < 255
    scaled = exact.abs().masked_fill_(~finite, 0) * _power_of_2(137 - exponent)  # in units of float16's last place
    below = scaled.to(torch.int32)
    above = ((scaled - below) * 65536).to(torch.int32).add_(draws).bitwise_right_shift_(16)
    magnitude = (below + above).float() * _power_of_2(exponent - 137)
    return torch.where(finite, torch.copysign(magnitude, exact), exact).to(torch.float16)


def _power_of_2(exponent: Tensor) -> Tensor:
    return (exponent + 127).bitwise_left_shift_(23).view(torch.float32)


def _mixed(x: Tensor) -> Tensor:
    """MurmurHash3's finaliser of 32 bits. Overwrites `x`, int32, whose products wrap around like unsigned ones."""
    x ^= (x >> 16) & 0xFFFF
    x *= _signed(_FIRST)
    x ^= (x >> 13) & 0x7FFFF
    x *= _signed(_SECOND)
    x ^= (x >> 16) & 0xFFFF
    return x


def _mixed_number(x: int) -> int:
    x = (x ^ x >> 16) * _FIRST & _MASK
    x = (x ^ x >> 13) * _SECOND & _MASK
    return x ^ x >> 16


def _signed(x: int) -> int:
    """The number with the same 32 lowest bits in int32's range."""
    return (x + (1 << 31) & _MASK) - (1 << 31)
