"""Scales 8-bit optimizer state with one maximum per block, as bitsandbytes keeps it (paper, section 4).

Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861), in the layout of
bitsandbytes: ``value = qmap[code] · absmax[block]``, where a block is 256 consecutive elements.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

BLOCK_SIZE = 256
"""Elements per block."""

COMPANIONS = {"state1": ("absmax1", "qmap1"), "state2": ("absmax2", "qmap2")}
"""For each quantised entry of a bitsandbytes optimizer's state, the keys of its block maxima and its code book."""


def scale_block_quantised(
    codes: UInt8[Tensor, "m n"],
    absmax: Float[Tensor, " blocks"],
    qmap: Float[Tensor, " entries"],
    factor: Tensor,
) -> None:
    """Multiply a quantised matrix by factors, in place.

    A block whose elements have the same factor keeps its codes; only its maximum is scaled, exactly up to float32
    rounding. Any other block is dequantised, scaled and quantised again as bitsandbytes does (divide by the largest
    magnitude, take the nearest entry of the code book), except that non-zero values never become zero.

    Args:
        codes: the 8-bit codes, in the parameter's shape; modified.
        absmax: the largest magnitude in each block, float32; modified.
        qmap: the code book, the values that the codes stand for in ascending order; signed or unsigned.
        factor: positive, broadcastable to the shape of the codes.

    Raises:
        ValueError: the number of maxima does not match blocks of 256 elements.
    """
    if absmax.numel() != -(-codes.numel() // BLOCK_SIZE):
        raise ValueError(
            f"{codes.numel()} quantised elements have {absmax.numel()} maxima: only blocks of {BLOCK_SIZE} are "
            "supported, which bitsandbytes uses since 0.44"
        )
    # Codes in paged memory are on the CPU; compute where the maxima are.
    code_blocks = _blocks(codes.to(absmax.device))
    factors = _blocks(factor.to(absmax).expand(codes.shape))
    uniform = factors.amin(-1) == factors.amax(-1)
    values = qmap[code_blocks.long()] * absmax[:, None] * factors
    largest = values.abs().amax(-1)
    # A block of zeros has no scale; any divisor gives zeros.
    normalised = values / torch.where(largest > 0, largest, 1)[:, None]
    nearest = torch.bucketize(normalised, (qmap[1:] + qmap[:-1]) / 2)
    # The optimizer divides by second moments, so a non-zero value must not become zero: take the next code instead.
    nearest += torch.where(qmap[nearest] == 0, normalised.sign(), 0).long()
    new_codes = torch.where(uniform[:, None], code_blocks, nearest.to(codes.dtype))
    absmax.copy_(torch.where(uniform, absmax * factors[:, 0], largest))
    codes.copy_(new_codes.flatten()[: codes.numel()].view(codes.shape))


def _blocks(matrix: Tensor) -> Tensor:
    """One block per row. The last row is padded with copies of the last element, which leave its maximum unchanged."""
    flat = matrix.flatten()
    return torch.cat([flat, flat[-1:].expand(-flat.numel() % BLOCK_SIZE)]).view(-1, BLOCK_SIZE)
