"""Signs for the blocks of an update: ``S ⊙ (A·Bᵀ)`` has k times the rank, at the cost of ``A·Bᵀ`` (docs/method.md).

S has one sign for each of k × k blocks, those of a Walsh–Hadamard matrix C: ``S ⊙ (A·Bᵀ)`` has the blocks
``c_ij·A_i·B_jᵀ``. As C has full rank, and all its singular values are equal, the sum of the blocks' ranks is not wasted
on a few directions. For any matrix of weight gradients G, those of A and B are what they would be without signs for
``S ⊙ G``: what holds for ``A·Bᵀ``, as of optimizers for pairs, holds in the space of ``S ⊙ W``.

BoRA (Li et al., arXiv 2508.06953) multiplies each block by a diagonal matrix, ``A_i·diag(σ_ij)·B_jᵀ``, which it trains.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def block_signs(
    m: int, n: int, blocks: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Float[Tensor, "k_out k_in"] | None:
    """C: the signs of the blocks of an m × n matrix, ``(−1)^popcount(i & j)``.

    A side that can't be divided into so many equal parts is divided into the largest power of two that it can.

    Args:
        m: rows of the matrix.
        n: columns of the matrix.
        blocks: k, a power of two.
        dtype: dtype of the signs.
        device: device of the signs.

    Returns:
        The signs; None if all are +1, as with a single part on either side.
    """
    k_out, k_in = math.gcd(m, blocks), math.gcd(n, blocks)
    if min(k_out, k_in) == 1:
        return None
    i, j = (torch.arange(k, device=device) for k in (k_out, k_in))
    common, odd = i[:, None] & j, torch.zeros((), dtype=torch.int64, device=device)
    for bit in range(blocks.bit_length()):
        odd = odd ^ (common >> bit & 1)
    return (1 - 2 * odd).to(dtype)


def expanded_A(lora_A: Float[Tensor, "r n"], parts: int) -> Float[Tensor, "R n"]:
    """The first of two ordinary factors whose product is ``S ⊙ (lora_B · lora_A)``: ``R = r·k_in``, block-diagonal.

    Args:
        lora_A: PEFT's ``lora_A.weight``.
        parts: k_in.
    """
    r, n = lora_A.shape
    expanded = lora_A.new_zeros(parts, r, parts, n // parts)
    expanded.diagonal(dim1=0, dim2=2).copy_(lora_A.view(r, parts, -1).permute(0, 2, 1))
    return expanded.view(parts * r, n)


def expanded_B(lora_B: Float[Tensor, "m r"], signs: Float[Tensor, "k_out k_in"]) -> Float[Tensor, "m R"]:
    """The second of two ordinary factors whose product is ``S ⊙ (lora_B · lora_A)``.

    Args:
        lora_B: PEFT's ``lora_B.weight``.
        signs: from `block_signs`.
    """
    m, r = lora_B.shape
    k_out, k_in = signs.shape
    in_parts = lora_B.view(k_out, m // k_out, 1, r)
    return (in_parts * signs.to(lora_B)[:, None, :, None]).view(m, k_in * r)


def compact_A(expanded: Float[Tensor, "R n"], parts: int) -> Float[Tensor, "r n"]:
    """The inverse of `expanded_A`. What is not block-diagonal in `expanded` is ignored.

    Args:
        expanded: the ordinary factor.
        parts: k_in.
    """
    R, n = expanded.shape
    blocks = expanded.view(parts, R // parts, parts, n // parts).diagonal(dim1=0, dim2=2)
    return blocks.permute(0, 2, 1).reshape(R // parts, n)


def compact_B(expanded: Float[Tensor, "m R"], parts: int) -> Float[Tensor, "m r"]:
    """The inverse of `expanded_B`. C's first column has no minus.

    Args:
        expanded: the ordinary factor.
        parts: k_in.
    """
    return expanded[:, : expanded.shape[1] // parts]


def blocks_of(lora_A: Float[Tensor, "R n"], lora_B: Float[Tensor, "m R"]) -> list[int]:
    """Of two ordinary factors that `expanded_A` and `expanded_B` have made: the numbers of blocks that make them.

    There are several if the parts are as many with each of them, or if the second factor is zero.

    Args:
        lora_A: the first factor.
        lora_B: the second factor.

    Returns:
        The numbers, in order; none if they are no such factors.
    """
    (R, n), m = lora_A.shape, len(lora_B)
    parts = _power_of_two(math.gcd(n, R))
    while parts > 1 and not torch.equal(expanded_A(compact_A(lora_A, parts), parts), lora_A):
        parts //= 2
    if parts == 1 or not lora_A.any():
        return []
    numbers, blocks = [], parts
    while blocks == parts or (math.gcd(n, blocks) == parts and blocks <= _power_of_two(m)):
        signs = block_signs(m, n, blocks, dtype=lora_B.dtype, device=lora_B.device)
        if signs is not None and torch.equal(expanded_B(compact_B(lora_B, parts), signs), lora_B):
            numbers.append(blocks)
        blocks *= 2
    return numbers


def _power_of_two(count: int) -> int:
    """The largest power of two that divides a number."""
    return count & -count


def product_with_A(x: Float[Tensor, "... n"], lora_A: Float[Tensor, "r n"], parts: int) -> Float[Tensor, "... R"]:
    """The product with the first ordinary factor, ``x · expanded_A(lora_A)ᵀ``, without that factor.

    Args:
        x: the input.
        lora_A: PEFT's ``lora_A.weight``.
        parts: k_in.
    """
    return _together(_in_parts(x, parts) @ _in_parts(lora_A, parts).mT, x)


def product_with_B(
    hidden: Float[Tensor, "... R"], lora_B: Float[Tensor, "m r"], signs: Float[Tensor, "k_out k_in"]
) -> Float[Tensor, "... m"]:
    """The product with the second ordinary factor, ``hidden · expanded_B(lora_B, signs)ᵀ``, without that factor.

    Args:
        hidden: what the first factor makes of the input.
        lora_B: PEFT's ``lora_B.weight``.
        signs: from `block_signs`.
    """
    k_out, k_in = signs.shape
    mixed = _mixed(signs.to(hidden), _in_parts(hidden, k_in))
    return _together(mixed @ _rows_in_parts(lora_B, k_out).mT, hidden)


def add_signed_linear(
    result: Float[Tensor, "... m"],
    x: Float[Tensor, "... n"],
    lora_A: Float[Tensor, "r n"],
    lora_B: Float[Tensor, "m r"],
    signs: Float[Tensor, "k_out k_in"],
    scaling: float = 1.0,
) -> Float[Tensor, "... m"]:
    """``result + scaling · x · (S ⊙ (lora_B · lora_A))ᵀ`` without the product of the factors.

    In place of r numbers for each token there are r for each part of the inputs, which C turns into r for each part of
    the outputs. A backward pass computes them again, so that no more is kept for it than x and the factors.

    Args:
        result: what to add to; its dtype may be another. The sum is in the wider of the two.
        x: the input.
        lora_A: PEFT's ``lora_A.weight``, in the input's dtype, as the other two.
        lora_B: PEFT's ``lora_B.weight``.
        signs: from `block_signs`.
        scaling: what the update is multiplied by.
    """
    # A compiler chooses by itself what to compute again, and the transforms of torch.func take no function of ours
    # without rules for each of them; their test has no public name.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return result + product_with_B(product_with_A(x, lora_A, signs.shape[1]), lora_B, signs) * scaling
    output: Tensor = _AddedProduct.apply(result, x, lora_A, lora_B, signs, scaling)  # type: ignore[no-untyped-call]
    return output


_Parts = Float[Tensor, "_ _ _"]


def _in_parts(x: Tensor, parts: int) -> _Parts:
    """The parts of the last dimension, each with all tokens."""
    tokens = math.prod(x.shape[:-1])
    return x.reshape(tokens, parts, x.shape[-1] // parts).transpose(0, 1)


def _rows_in_parts(lora_B: Tensor, parts: int) -> _Parts:
    """The parts of the first dimension."""
    return lora_B.view(parts, -1, lora_B.shape[1])


def _together(output: _Parts, x: Tensor) -> Tensor:
    """The inverse of `_in_parts`, for an output that belongs to an input."""
    parts, _, width = output.shape
    return output.transpose(0, 1).reshape(*x.shape[:-1], parts * width)


def _mixed(signs: Tensor, parts: _Parts) -> _Parts:
    return (signs @ parts.flatten(1)).view(len(signs), *parts.shape[1:])


class _AddedProduct(torch.autograd.Function):
    """Saves the input, the factors and the signs alone."""

    @staticmethod
    def forward(
        ctx: Any, result: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, signs: Tensor, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(x, lora_A, lora_B, signs)
        ctx.scaling, ctx.dtype_of_result = scaling, result.dtype
        k_out, k_in = signs.shape
        mixed = _mixed(signs, _in_parts(x, k_in) @ _in_parts(lora_A, k_in).mT)
        B = _rows_in_parts(lora_B, k_out).mT
        if torch.promote_types(result.dtype, x.dtype) != x.dtype:
            return result + _together(mixed @ B, x) * scaling
        # In place of a product in parts, which is copied to be put together, multiplied and added.
        output = result.to(x.dtype, copy=True, memory_format=torch.contiguous_format)
        _in_parts(output, k_out).baddbmm_(mixed, B, alpha=scaling)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, signs = ctx.saved_tensors
        for_result, for_x, for_A, for_B, *_ = ctx.needs_input_grad
        k_out, k_in = signs.shape
        A, B = _in_parts(lora_A, k_in), _rows_in_parts(lora_B, k_out)
        in_parts, of_update = _in_parts(x, k_in), _in_parts(grad.to(x.dtype), k_out)
        grad_x = grad_A = grad_B = None
        if for_B:  # first, so that what it takes is free again
            # The product the other way round takes twice as long.
            grad_B = (_mixed(signs, in_parts @ A.mT).mT @ of_update).mT.reshape(lora_B.shape) * ctx.scaling
        if for_x or for_A:
            grad_hidden = _mixed(signs.mT, of_update @ (B * ctx.scaling))
            grad_x = _product_together(grad_hidden, A, x) if for_x else None
            grad_A = _together(grad_hidden.mT @ in_parts, lora_A) if for_A else None
        return grad.to(ctx.dtype_of_result) if for_result else None, grad_x, grad_A, grad_B, None, None


def _product_together(parts: _Parts, factors: _Parts, x: Tensor) -> Tensor:
    """Products of parts, put together as an input is."""
    if torch.is_grad_enabled():  # for second derivatives
        return _together(parts @ factors, x)
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.bmm(parts, factors, out=_in_parts(output, len(parts)))
    return output
