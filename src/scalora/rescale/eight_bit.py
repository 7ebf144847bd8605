"""Dense remainders in half the memory: 8 instead of 16 bits of each entry's rounding error."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from scalora.rescale.remainder import DenseRemainder
from scalora.rescale.rounding import join, split


class EightBitRemainder(DenseRemainder):
    """Adds remainders to the base weight in place, and keeps 8 bits of what a half-precision one is rounded by.

    That is 1 byte per entry: the upper half of what `DenseRemainder` keeps, rounded to nearest, for bfloat16; for
    float16 the error in 128ths of the largest possible one. So each merge is off by half a 256th of the spacing of the
    half-precision numbers, or a whole one next to the middle between two, without bias.

    A merge of nothing changes no bit. For a float32 or float64 weight it is a `DenseRemainder`.
    """

    _KEPT: ClassVar[torch.dtype] = torch.int8

    def _add_to_rows(self, weight: Tensor, part: slice, left: Tensor, right: Tensor) -> None:
        assert self.rounded_off is not None
        block, low = weight[part], self.rounded_off[part]
        exact = join(block, low).addmm_(left, right)
        # A sum of 0 has the weight's sign, which -0 + 0 would lose. In integers, because operations on booleans take
        # ten times as long on CPUs.
        bits = exact.view(torch.int32)
        where_zero = bits.bitwise_and(0x7FFFFFFF).clamp_(max=1).sub_(1).bitwise_left_shift_(31)
        bits.bitwise_or_(where_zero.bitwise_and_(block.float().view(torch.int32)))
        split(exact, block, low)
