"""Scales optimizer state that is kept as 8-bit codes with one maximum per block (bitsandbytes).

Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861), in the layout of
bitsandbytes: ``value = qmap[code] · absmax[block]``, a block being 256 consecutive elements.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

BLOCK_SIZE = 256

COMPANIONS = {"state1": ("absmax1", "qmap1"), "state2": ("absmax2", "qmap2")}
"""Where an optimizer of bitsandbytes keeps the maxima and the code book of each quantised entry."""


def scale_block_quantised(
    codes: UInt8[Tensor, "m n"],
    absmax: Float[Tensor, " blocks"],
    qmap: Float[Tensor, " entries"],
    factor: Tensor,
) -> None:
    """Multiply a quantised matrix by a factor, in place.

    A block whose elements share one factor keeps its codes and scales its maximum: exact to float32 rounding. Any other
    is decoded, scaled and coded again by bitsandbytes' own rule (divide by the largest magnitude, take the nearest
    entry of the same code book), save that nothing but zero becomes zero.

    Args:
        codes: in the parameter's shape.
        absmax: the largest magnitude of each block.
        qmap: the sorted values that the codes stand for; signed or unsigned.
        factor: broadcastable against the codes, positive.

    Raises:
        ValueError: the number of maxima is not that of blocks of 256 elements.
    """
    if absmax.numel() != -(-codes.numel() // BLOCK_SIZE):
        raise ValueError(
            f"{codes.numel()} quantised elements have {absmax.numel()} maxima: only blocks of {BLOCK_SIZE} are known, "
            "which bitsandbytes uses since 0.44"
        )
    # Codes in paged memory count as the host's; the arithmetic is done where the maxima are.
    code_blocks = _blocks(codes.to(absmax.device))
    factors = _blocks(factor.to(absmax).expand(codes.shape))
    uniform = factors.amin(-1) == factors.amax(-1)
    values = qmap[code_blocks.long()] * absmax[:, None] * factors
    largest = values.abs().amax(-1)
    # A block of zeros has no scale of its own; any divisor codes it as zeros.
    normalised = values / torch.where(largest > 0, largest, 1)[:, None]
    nearest = torch.bucketize(normalised, (qmap[1:] + qmap[:-1]) / 2)
    # Zero is not near to a second moment, which is divided by: what was not zero takes the entry beside it.
    nearest += torch.where(qmap[nearest] == 0, normalised.sign(), 0).long()
    new_codes = torch.where(uniform[:, None], code_blocks, nearest.to(codes.dtype))
    absmax.copy_(torch.where(uniform, absmax * factors[:, 0], largest))
    codes.copy_(new_codes.flatten()[: codes.numel()].view(codes.shape))


def _blocks(matrix: Tensor) -> Tensor:
    """One block per row; the last is filled up with copies of the last element, which change no maximum."""
    flat = matrix.flatten()
    return torch.cat([flat, flat[-1:].expand(-flat.numel() % BLOCK_SIZE)]).view(-1, BLOCK_SIZE)
