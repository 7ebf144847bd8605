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

    What a merge does not change keeps all its bits. For a float32 or float64 weight it is a `DenseRemainder`.
    """

    _KEPT: ClassVar[torch.dtype] = torch.int8

    def _add_to_rows(self, weight: Tensor, part: slice, left: Tensor, right: Tensor) -> None:
        assert self.rounded_off is not None
        block, low = weight[part], self.rounded_off[part]
        old = join(block, low)
        exact = torch.addmm(old, left, right)
        changed = (exact != old) & (old == old)
        rounded, rest = torch.empty_like(block), torch.empty_like(low)
        split(exact, rounded, rest)
        block.copy_(torch.where(changed, rounded, block))
        low.copy_(torch.where(changed, rest, low))
