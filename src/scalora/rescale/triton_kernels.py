"""The kernel of `scalora.rescale.one_pass`: a merge into all layers of one shape that moves every byte once.

It has the arithmetic of `scalora.rescale.remainder` and `scalora.rescale.stochastic`, entry by entry; those are the
reference. Imported only where there is Triton. ``no_type_check`` keeps import hooks from wrapping what Triton compiles.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _mixed(x):
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    x ^= x >> 16
    return x


@triton.jit
@no_type_check
def _scaled(factor, coefficient):
    # As `scale_columns`: whatever the factor holds where the coefficient is 0.
    return tl.where(coefficient == 0, 0.0, factor * coefficient)


@triton.jit
@no_type_check
def _left_tile(pointer, coefficients, row, k, rows, row_stride, k_stride, RANK: tl.constexpr):
    coefficient = tl.load(coefficients + k, mask=k < RANK, other=0.0)
    offsets = row[:, None] * row_stride + k[None, :] * k_stride
    inside = (row < rows)[:, None] & (k < RANK)[None, :]
    return _scaled(tl.load(pointer + offsets, mask=inside, other=0.0), coefficient[None, :])


@triton.jit
@no_type_check
def _right_tile(pointer, coefficients, column, k, columns, column_stride, k_stride, RANK: tl.constexpr):
    coefficient = tl.load(coefficients + k, mask=k < RANK, other=0.0)
    offsets = k[:, None] * k_stride + column[None, :] * column_stride
    inside = (k < RANK)[:, None] & (column < columns)[None, :]
    return tl.where(coefficient[:, None] == 0, 0.0, tl.load(pointer + offsets, mask=inside, other=0.0))


@triton.jit
@no_type_check
def _join_bfloat16(rounded, low):
    rounded = rounded.to(tl.int32) << 16
    low = low.to(tl.int32)
    low = tl.where((rounded & 0x7FFF0000) == 0, tl.maximum(low, 0), low)
    return (rounded + low).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def _split_bfloat16(exact):
    bits = exact.to(tl.int32, bitcast=True)
    # With a carry of half an interval: of two numbers that are equally near, the one of larger magnitude.
    rounded = tl.where(exact == exact, (bits + 0x8000) >> 16, 0x7FC0)
    return rounded.to(tl.int16), bits.to(tl.int16)


@triton.jit
@no_type_check
def _float16_exponent(rounded):
    return tl.maximum((rounded.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF) >> 10, 1)


@triton.jit
@no_type_check
def _power_of_2(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def _join_float16(rounded, low, PARTS: tl.constexpr):
    interval = _power_of_2(_float16_exponent(rounded) - 26)
    return rounded.to(tl.float32) + tl.div_rn(low.to(tl.float32), PARTS) * interval


@triton.jit
@no_type_check
def _split_float16(exact, PARTS: tl.constexpr, MOST: tl.constexpr):
    rounded = exact.to(tl.float16)
    exponent = _float16_exponent(rounded)
    fraction = (exact - rounded.to(tl.float32)) * _power_of_2(26 - exponent) * PARTS
    # Adding and subtracting this rounds to integers, ties to even.
    fraction = (fraction + 12582912.0) - 12582912.0
    fraction = tl.minimum(tl.maximum(fraction, -MOST), MOST)
    return rounded, tl.where(exponent < 31, fraction, 0.0).to(tl.int16)


@triton.jit
@no_type_check
def _with_sign_of_zero(exact, bits):
    # Which -0 + 0 would lose.
    own = exact.to(tl.int32, bitcast=True)
    return tl.where((own & 0x7FFFFFFF) == 0, bits & -0x80000000, own).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def _draws(key, row, column):
    """16 random bits for each entry, as `scalora.rescale.stochastic.draws`."""
    of_row = _mixed(key + row.to(tl.uint32) * 0x9E3779B9)
    return (_mixed(of_row[:, None] ^ column.to(tl.uint32)[None, :]) >> 16).to(tl.int32)


@triton.jit
@no_type_check
def _bfloat16_by_draws(exact, draws):
    bits = exact.to(tl.int32, bitcast=True)
    return tl.where(exact == exact, (bits + draws) >> 16, 0x7FC0).to(tl.int16)


@triton.jit
@no_type_check
def _float16_by_draws(exact, draws):
    bits = exact.to(tl.int32, bitcast=True)
    exponent = tl.maximum((bits & 0x7FFFFFFF) >> 23, 113)
    finite = exponent < 255
    # In units of the last place of float16.
    scaled = tl.where(finite, tl.abs(exact), 0.0) * _power_of_2(137 - exponent)
    below = scaled.to(tl.int32)
    above = (((scaled - below.to(tl.float32)) * 65536.0).to(tl.int32) + draws) >> 16
    magnitude = (below + above).to(tl.float32) * _power_of_2(exponent - 137)
    signed = (magnitude.to(tl.int32, bitcast=True) | (bits & -0x80000000)).to(tl.float32, bitcast=True)
    return tl.where(finite, signed, exact).to(tl.float16)


@triton.jit(do_not_specialize=["rows_before"])
@no_type_check
def merge_kernel(
    table,
    left,
    right,
    coefficients,
    step,
    rows_before,
    rows,
    columns,
    left_layer,
    left_row,
    left_k,
    right_layer,
    right_column,
    right_k,
    DTYPE: tl.constexpr,
    ROUNDING: tl.constexpr,
    BITS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add ``left · diag(coefficients) · right`` to some tiles of one layer's weight, which is stored row by row.

    Args:
        table: int64, (layers, 3): addresses of the weight and of what was rounded off it, and the hash of the name.
        left: factor of the weights' rows, float32.
        right: factor of the weights' columns, float32.
        coefficients: float32, (layers, RANK).
        step: number of the optimizer step, for stochastic rounding: a float64 scalar on the device; otherwise None.
        rows_before: rows of the weights before those that are here, for stochastic rounding.
        rows: rows of each weight.
        columns: columns of each weight.
        left_layer: stride of `left` from layer to layer.
        left_row: its stride from row to row.
        left_k: its stride from column to column of the factor.
        right_layer: stride of `right` from layer to layer.
        right_column: its stride from column to column of the weight.
        right_k: its stride from column to column of the factor.
        DTYPE: name of the weights' dtype.
        ROUNDING: ``"none"`` for float32; ``"kept"`` or ``"stochastic"``.
        BITS: of a rounding error that is kept, 16 or 8.
        RANK: columns of the factors.
        BLOCK_M: rows of a tile.
        BLOCK_N: columns of a tile.
        BLOCK_K: columns of the factors that are multiplied at a time; 0: outer products are added one after the other.
        TILES: tiles of a program, side by side.
        PRECISION: how `tl.dot` multiplies float32.
    """
    layer = tl.program_id(1)
    per_strip = tl.cdiv(tl.cdiv(columns, BLOCK_N), TILES)
    first_row = (tl.program_id(0) // per_strip) * BLOCK_M
    first_tile = (tl.program_id(0) % per_strip) * TILES
    row = first_row + tl.arange(0, BLOCK_M)
    left += layer.to(tl.int64) * left_layer
    right += layer.to(tl.int64) * right_layer
    coefficients += layer * RANK
    address = tl.load(table + layer * 3)
    if ROUNDING == "stochastic":
        key = _mixed(tl.load(table + layer * 3 + 2).to(tl.uint32) ^ _mixed(tl.load(step).to(tl.int64).to(tl.uint32)))
    if BLOCK_K >= RANK:
        resident = _left_tile(left, coefficients, row, tl.arange(0, BLOCK_K), rows, left_row, left_k, RANK)
    for tile in range(first_tile, tl.minimum(first_tile + TILES, tl.cdiv(columns, BLOCK_N))):
        column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        # A weight may have more than 2³¹ entries, a tile does not.
        start = first_row.to(tl.int64) * columns + tile * BLOCK_N
        offsets = tl.arange(0, BLOCK_M)[:, None] * columns + tl.arange(0, BLOCK_N)[None, :]
        if DTYPE == "float32":
            weight = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16) + start + offsets
        elif DTYPE == "float16":
            weight = tl.multiple_of(address.to(tl.pointer_type(tl.float16)), 16) + start + offsets
        else:
            weight = tl.multiple_of(address.to(tl.pointer_type(tl.int16)), 16) + start + offsets
        before = tl.load(weight, mask=inside, other=0)
        if ROUNDING == "kept":
            low_address = tl.load(table + layer * 3 + 1)
            if BITS == 8:
                low = tl.multiple_of(low_address.to(tl.pointer_type(tl.int8)), 16) + start + offsets
            else:
                low = tl.multiple_of(low_address.to(tl.pointer_type(tl.int16)), 16) + start + offsets
            rounded_off = tl.load(low, mask=inside, other=0)

        change = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if BLOCK_K == 0:
            for k in tl.static_range(RANK):
                coefficient = tl.load(coefficients + k)
                of_row = tl.load(left + row * left_row + k * left_k, mask=row < rows, other=0.0)
                of_column = tl.load(right + column * right_column + k * right_k, mask=column < columns, other=0.0)
                of_column = tl.where(coefficient == 0, 0.0, of_column)
                change = tl.fma(_scaled(of_row, coefficient)[:, None], of_column[None, :], change)
        elif BLOCK_K >= RANK:
            k = tl.arange(0, BLOCK_K)
            other = _right_tile(right, coefficients, column, k, columns, right_column, right_k, RANK)
            change = tl.dot(resident, other, change, input_precision=PRECISION)
        else:
            for first_k in range(0, RANK, BLOCK_K):
                k = first_k + tl.arange(0, BLOCK_K)
                one = _left_tile(left, coefficients, row, k, rows, left_row, left_k, RANK)
                other = _right_tile(right, coefficients, column, k, columns, right_column, right_k, RANK)
                change = tl.dot(one, other, change, input_precision=PRECISION)

        if ROUNDING == "none":
            tl.store(weight, before + change, mask=inside)
        elif ROUNDING == "kept":
            if BITS == 8:
                if DTYPE == "bfloat16":
                    exact = _join_bfloat16(before, rounded_off.to(tl.int32) << 8) + change
                    exact = _with_sign_of_zero(exact, before.to(tl.int32) << 16)
                    rounded, distance = _split_bfloat16(exact)
                    rest = tl.minimum((distance.to(tl.int32) + 128) >> 8, 127).to(tl.int8)
                else:
                    exact = _join_float16(before, rounded_off, 128.0) + change
                    exact = _with_sign_of_zero(exact, before.to(tl.float32).to(tl.int32, bitcast=True))
                    rounded, distance = _split_float16(exact, 128.0, 127.0)
                    rest = distance.to(tl.int8)
            elif DTYPE == "bfloat16":
                rounded, rest = _split_bfloat16(_join_bfloat16(before, rounded_off) + change)
            else:
                rounded, rest = _split_float16(_join_float16(before, rounded_off, 32767.0) + change, 32767.0, 32767.0)
            tl.store(weight, rounded, mask=inside)
            tl.store(low, rest, mask=inside)
        else:
            draws = _draws(key, row + rows_before, column)
            if DTYPE == "bfloat16":
                old = (before.to(tl.int32) << 16).to(tl.float32, bitcast=True)
                exact = old + change
                rounded = _bfloat16_by_draws(exact, draws)
            else:
                old = before.to(tl.float32)
                exact = old + change
                rounded = _float16_by_draws(exact, draws)
            # What does not change keeps its bits, the sign of a zero too.
            tl.store(weight, tl.where((exact != old) & (old == old), rounded, before), mask=inside)
