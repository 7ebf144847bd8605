"""Merges that pass once over memory: ``weight += left @ right.T``, compiled by inductor for CPUs and GPUs.

Not part of the library: on a CPU the C++ is faster on the layers of small models, on a GPU this takes a fifth to a
seventh of the time of PyTorch's own operations in bfloat16 (`merge_speed.py`, docs/cost.md).

A half-precision weight and what its rounding left out (see `scalora.rescale.remainder`) are joined, added to, and split
again in one loop. Two neighbouring entries, of two bytes each, are taken together as one int32: inductor does not
vectorise int16 on CPUs.
"""

from __future__ import annotations

import functools
import itertools
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to this rank the product is a sum of outer products within the loop; above it, a matrix product that is stored.
_UNROLLED_ON_CPU, _UNROLLED_ON_GPU = 32, 16

# Rows that share what is loaded of `right`, on a CPU. They are far apart, so that each is a stream of its own.
_SHARING = 4

# Entries, a cache line of them, that keep rows of `right` apart: if their distance were a power of 2, as that of many
# weights is, they would all compete for the same few places in a CPU's cache.
_PADDING = 16

# Entries of a stored product: on a CPU, it should stay in the caches.
_BLOCK, _BLOCK_ON_CPU = 1 << 24, 1 << 18

# Products are added without being rounded first.
_OPTIONS: dict[str, Any] = {"cpp.enable_floating_point_contract_flag": "fast"}
# No intermediate result is stored, however long the expression. Sums of outer products need this for being one loop;
# an expression that uses many of its parts more than once would take minutes to compile.
_INLINED = {
    **_OPTIONS,
    "realize_opcount_threshold": 1 << 20,
    "realize_reads_threshold": 1 << 20,
    "realize_acc_reads_threshold": 1 << 20,
}


@torch.no_grad()
def merge_(weight: Tensor, rounded_off: Tensor | None, left: Tensor, right: Tensor) -> bool:
    """Add ``left @ right.T`` to `weight` in place, if that can be compiled.

    Args:
        weight: (m, n), float32, or float16 or bfloat16 with `rounded_off`.
        rounded_off: as in `DenseRemainder`: int16, (m, n).
        left: (m, r); from `scale_columns`.
        right: (n, r).

    Returns:
        Whether it was done. If not, nothing has changed, and it is left to PyTorch's own operations.
    """
    if not (_is_plain(weight, rounded_off) and can_compile(weight.device)):
        return False
    left, right = left.float().contiguous(), right.float().mT
    unrolled = (
        left.shape[1] <= (_UNROLLED_ON_CPU if weight.is_cpu else _UNROLLED_ON_GPU) and weight.dtype != torch.float16
    )
    parts = _SHARING if weight.is_cpu and len(weight) % _SHARING == 0 else 1
    kind = weight.shape, left.shape[1], weight.device
    if rounded_off is None:
        if unrolled:
            _add_outer_products(*kind)(weight.chunk(parts), left.chunk(parts), _padded(right))
        else:
            weight.addmm_(left, right)
        return True
    # The even columns and the odd ones: (2, r, n / 2).
    right = right.unflatten(1, (-1, 2)).permute(2, 0, 1)
    pairs, lows = weight.view(torch.int32), rounded_off.view(torch.int32)
    if unrolled:
        add = _add_outer_products_to_pairs(weight.dtype, *kind)
        add(pairs.chunk(parts), lows.chunk(parts), left.chunk(parts), _padded(right))
        return True
    right = right.contiguous()
    rows = max(1, (_BLOCK_ON_CPU if weight.is_cpu else _BLOCK) // weight.shape[1])
    for block, low, part in zip(pairs.split(rows), lows.split(rows), left.split(rows), strict=True):
        _add_to_pairs(weight.dtype)(block.view(-1), low.view(-1), (part @ right).view(2, -1))
    return True


def _padded(right: Tensor) -> Tensor:
    return F.pad(right, (0, _PADDING))[..., :-_PADDING]


def _is_plain(weight: Tensor, rounded_off: Tensor | None) -> bool:
    if rounded_off is None:
        return weight.dtype == torch.float32 and weight.is_contiguous()
    return weight.dtype in _HALVES and all(
        t.is_contiguous() and t.shape[1] % 2 == 0 and t.storage_offset() % 2 == 0 for t in (weight, rounded_off)
    )


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Whether inductor has what it needs: a C++ compiler, or Triton on a GPU. Warns once if not."""
    try:
        torch.compile(torch.neg, fullgraph=True)(torch.zeros(2, device=device))
    except Exception as error:  # whatever a missing or broken compiler leads to
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"merges on {device} are not compiled: {reason}", stacklevel=3)
        return False
    return True


# ---- Compiled functions ----------------------------------------------------------------------------------------------


@functools.cache
def _add_outer_products(shape: torch.Size, rank: int, device: torch.device) -> Callable[..., None]:
    def add(weights: Sequence[Tensor], lefts: Sequence[Tensor], right: Tensor) -> None:
        for weight, left in zip(weights, lefts, strict=True):
            weight.add_(_outer_products(left, right))

    return _compiled_for_one_shape(add)


@functools.cache
def _add_outer_products_to_pairs(
    dtype: torch.dtype, shape: torch.Size, rank: int, device: torch.device
) -> Callable[..., None]:
    def add(pairs: Sequence[Tensor], lows: Sequence[Tensor], lefts: Sequence[Tensor], right: Tensor) -> None:
        even, odd = right
        for block, low, left in zip(pairs, lows, lefts, strict=True):
            _add_to_both(dtype, block, low, _outer_products(left, even), _outer_products(left, odd))

    return _compiled_for_one_shape(add)


@functools.cache
def _add_to_pairs(dtype: torch.dtype) -> Callable[..., None]:
    def add(pairs: Tensor, low: Tensor, change: Tensor) -> None:
        _add_to_both(dtype, pairs, low, *change)

    return torch.compile(add, fullgraph=True, dynamic=True, options=_OPTIONS)


_numbers = itertools.count()


def _compiled_for_one_shape(function: Callable[..., None]) -> Callable[..., None]:
    # Dynamo counts recompilations, and looks through what it has compiled, by code object: each shape gets its own.
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    copy = types.FunctionType(code, function.__globals__, code.co_name, None, function.__closure__)
    return torch.compile(copy, fullgraph=True, dynamic=False, options=_INLINED)


def _outer_products(left: Tensor, right: Tensor) -> Tensor:
    total = left[:, 0, None] * right[0]
    for k in range(1, left.shape[1]):
        total = total + left[:, k, None] * right[k]
    return total


def _add_to_both(dtype: torch.dtype, pairs: Tensor, low: Tensor, even: Tensor, odd: Tensor) -> None:
    join, split = _HALVES[dtype]
    rounded, rest = split(join(pairs & 0xFFFF, low << 16 >> 16) + even)
    second_rounded, second_rest = split(join(pairs >> 16 & 0xFFFF, low >> 16) + odd)
    pairs.copy_(rounded & 0xFFFF | second_rounded << 16)
    low.copy_(rest & 0xFFFF | second_rest << 16)


# ---- `_join` and `_split` of `scalora.rescale.remainder`, on the bits of a half-precision number in an int32 ---------


def _join_bfloat16(rounded: Tensor, low: Tensor) -> Tensor:
    return ((rounded << 16) + low).view(torch.float32)


def _split_bfloat16(exact: Tensor) -> tuple[Tensor, Tensor]:
    bits = exact.view(torch.int32)
    return (bits + (1 << 15)) >> 16, bits


def _join_float16(rounded: Tensor, low: Tensor) -> Tensor:
    return _widened(rounded) + low.float() / 32767 * _power_of_2(_interval(rounded & 0x7FFF))


def _split_float16(exact: Tensor) -> tuple[Tensor, Tensor]:
    rounded = _narrowed(exact)
    magnitude = rounded & 0x7FFF
    fraction = ((exact - _widened(rounded)) * _power_of_2(-_interval(magnitude)) * 32767).round()
    return rounded, torch.where(magnitude < 0x7C00, fraction, 0).clamp(-32767, 32767).to(torch.int32)


def _interval(magnitude: Tensor) -> Tensor:
    """The exponent of half the spacing of float16 at a number without its sign; at 0, what `frexp` leads to."""
    return torch.where(magnitude == 0, -12, (magnitude >> 10).clamp(min=1) - 26)


def _power_of_2(exponent: Tensor) -> Tensor:
    return ((exponent + 127) << 23).view(torch.float32)


def _widened(half: Tensor) -> Tensor:
    """Float16 to float32."""
    magnitude = half & 0x7FFF
    # From the exponent's offset of float16, 15, to that of float32, 127; and as far again for infinity and NaN.
    bits = (magnitude << 13) + (112 << 23)
    bits = torch.where(magnitude < 0x7C00, bits, bits + (112 << 23))
    subnormal = (magnitude.float() * 2.0**-24).view(torch.int32)
    return (torch.where(magnitude < 0x400, subnormal, bits) | (half & 0x8000) << 16).view(torch.float32)


def _narrowed(exact: Tensor) -> Tensor:
    """Float32 to float16, ties to even."""
    bits = exact.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude - (112 << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13
    # The last place of 0.5 is the smallest subnormal number.
    subnormal = (magnitude.view(torch.float32) + 0.5).view(torch.int32) - (126 << 23)
    half = torch.where(magnitude < 113 << 23, subnormal, normal.clamp(max=0x7C00))
    half = torch.where(magnitude > 255 << 23, 0x7E00 | magnitude >> 13 & 0x3FF, half)
    return half | bits >> 16 & 0x8000


_Join = Callable[[Tensor, Tensor], Tensor]
_Split = Callable[[Tensor], tuple[Tensor, Tensor]]
_HALVES: dict[torch.dtype, tuple[_Join, _Split]] = {
    torch.bfloat16: (_join_bfloat16, _split_bfloat16),
    torch.float16: (_join_float16, _split_float16),
}
