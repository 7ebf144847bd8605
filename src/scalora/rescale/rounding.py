"""Half-precision numbers and what was rounded off them: splitting float32 numbers, and joining them again."""

from __future__ import annotations

import torch
from torch import Tensor

# Bits of float16's significand, including the implicit one.
_SIGNIFICAND = 11

# Into how many parts half of float16's spacing is divided, and how many are kept at most. A number and a multiple of a
# 128th are joined exactly, and 127 of them are never rounded to the next number: that is split as it was joined.
_PARTS = {torch.int16: 32767, torch.int8: 128}
_MOST_PARTS = {torch.int16: 32767, torch.int8: 127}


def join(rounded: Tensor, low: Tensor) -> Tensor:
    """The float32 numbers that `split` was given: exactly for bfloat16 with 16 bits, to 2⁻²⁶ relative for float16.

    With 8 bits, to half a 256th of the spacing of the half-precision numbers, or a whole one next to its middle.

    Args:
        rounded: half-precision numbers.
        low: their rounding errors from `split`, int16 or int8.
    """
    exact = rounded.float()
    if rounded.dtype == torch.bfloat16:
        # bfloat16 is the upper half of a float32: adding the bits that were rounded off restores the float32. Numbers
        # that round to 0 are never below it in magnitude, so a zero with a negative lower half is a weight that others
        # have written to since; the bits below those of a zero would be a NaN's. Integer operations, because those on
        # booleans take ten times as long on CPUs.
        lowest = rounded.view(torch.int16).bitwise_and(0x7FFF).clamp_(max=1).bitwise_left_shift_(15)
        if low.dtype == torch.int8:
            low = low.to(torch.int16).bitwise_left_shift_(8)
        exact.view(torch.int32).add_(torch.maximum(low, lowest))
        return exact
    return exact + low.float() / _PARTS[low.dtype] * _interval(rounded)


def split(exact: Tensor, rounded: Tensor, low: Tensor) -> None:
    """Split float32 numbers into the nearest half-precision ones and their rounding errors.

    Args:
        exact: the numbers; overwritten.
        rounded: where to put the half-precision numbers.
        low: where to put their rounding errors, int16 or int8.
    """
    if rounded.dtype == torch.bfloat16:
        # The lower half, read as a signed integer, is the distance of the float32 from the nearest bfloat16. Of two
        # that are equally near it is the distance from the larger one, to which torch rounds once a lower bit is set.
        bits = exact.view(torch.int32)
        distance = low if low.dtype == torch.int16 else torch.empty_like(low, dtype=torch.int16)
        distance.copy_(bits)
        bits.bitwise_or_(distance.clamp(-1, 0).neg_())
        rounded.copy_(exact)
        if distance is not low:
            # The nearest multiple of 2⁸, the larger one of two, up to 127: over all distances the errors are 0 in sum.
            low.copy_(distance.bitwise_right_shift_(7).add_(1).bitwise_right_shift_(1).clamp_(max=127))
        return
    rounded.copy_(exact)
    fraction = ((exact - rounded.float()) / _interval(rounded) * _PARTS[low.dtype]).round()
    most = _MOST_PARTS[low.dtype]
    low.copy_(fraction.nan_to_num(0, 0, 0).clamp(-most, most))


def _interval(rounded: Tensor) -> Tensor:
    """Half the spacing of float16 at each entry, in float32: the largest possible rounding error."""
    # Zero and the numbers below the smallest normal one are as far apart as those from it on.
    limits = torch.finfo(torch.float16)
    exponent = torch.frexp(rounded.float().abs_().clamp_(limits.tiny, limits.max)).exponent
    return torch.ldexp(torch.ones((), device=rounded.device).expand(exponent.shape), exponent - _SIGNIFICAND - 1)
