"""A half-precision weight and what its rounding left out, over all numbers: exact, and never NaN by itself."""

import pytest
import torch
from conftest import NO_COMPILER
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scalora.rescale import kernels, native
from scalora.rescale.native import operations
from scalora.rescale.remainder import DenseRemainder

BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16

# Lower halves of a float32: none, the smallest, around the middle, where rounding turns, and the largest.
LOW = torch.tensor([0x0000, 0x0001, 0x1234, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xABCD, 0xFFFE, 0xFFFF])

needs_compiler = pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler")


def int16(values):
    return torch.where(values >= 1 << 15, values - (1 << 16), values).to(torch.int16)


def every_float32_of(lows):
    """Every upper half with every lower half of a list, (65536, lows)."""
    upper = int16(torch.arange(1 << 16)).int()[:, None]
    return (upper.bitwise_left_shift(16) | lows.int()).view(torch.float32)


def every_pair(dtype, lows):
    """Every half-precision weight with every stored rounding error of a list."""
    weight = int16(torch.arange(1 << 16)).view(dtype)[:, None].expand(-1, len(lows)).contiguous()
    remainder = DenseRemainder(weight, transposed=False)
    remainder.rounded_off.copy_(lows.expand(1 << 16, -1))
    return nn.Parameter(weight, requires_grad=False), remainder


def rounded(exact, dtype):
    """The weight and the remainder of numbers in float32."""
    weight = nn.Parameter(torch.empty(exact.shape, dtype=dtype), requires_grad=False)
    remainder = DenseRemainder(weight.data, transposed=False)
    remainder.rebuild(exact, weight)
    return weight, remainder


def same_bits(one, other):
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def test_every_number_comes_back_bit_for_bit_from_bfloat16_and_what_was_rounded_off():
    exact = every_float32_of(LOW)
    weight, remainder = rounded(exact, BFLOAT16)
    again, valid = remainder.exact(weight), ~exact.isnan()
    assert same_bits(again[valid], exact[valid])
    assert again[~valid].isnan().all()
    assert weight[~valid].isnan().all()
    assert not weight[valid].isnan().any()


def test_the_bfloat16_weight_is_the_nearest_one():
    exact = every_float32_of(LOW)
    weight, _ = rounded(exact, BFLOAT16)
    nearest = exact.to(BFLOAT16)
    # Infinite where torch's own rounding is, beyond the largest bfloat16.
    assert torch.equal(weight.isinf(), nearest.isinf())
    finite = nearest.isfinite()
    distances = ((w[finite].double() - exact[finite].double()).abs() for w in (weight, nearest))
    assert torch.equal(*distances)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
def test_no_stored_pair_makes_a_finite_weight_infinite_or_nan(dtype):
    weight, remainder = every_pair(dtype, int16(LOW))
    exact, finite = remainder.exact(weight), weight.isfinite()
    assert exact[finite].isfinite().all()
    assert exact[weight.isnan()].isnan().all()
    # A weight that others have written to since is off by no more than it could be by rounding.
    spacing = torch.finfo(dtype).eps * weight[finite].double().abs().clamp(min=torch.finfo(dtype).tiny)
    assert ((exact[finite].double() - weight[finite].double()).abs() <= 0.5001 * spacing).all()


def test_every_finite_float16_pair_comes_back():
    weight, remainder = every_pair(FLOAT16, int16(LOW).clamp(min=-32767))
    exact = remainder.exact(weight)
    # Beyond this, float16 rounds to infinity.
    kept = exact.abs() < 65520
    again = torch.zeros_like(exact)
    other, remainder = rounded(exact, FLOAT16)
    again = remainder.exact(other)
    assert ((again - exact)[kept].abs() <= 2.0**-26 * exact[kept].abs().clamp(min=2.0**-14)).all()
    assert torch.equal(other[kept], exact[kept].to(FLOAT16))
    assert torch.equal(again.isnan(), exact.isnan())


@pytest.mark.parametrize("merge", [kernels.merge, pytest.param(operations.merge, marks=needs_compiler)])
def test_a_weight_that_others_set_to_zero_can_be_merged_into(merge):
    if merge is operations.merge:
        native.build()
    rows, columns = 5, 37  # full vectors and a rest
    weight = torch.full((rows, columns), 1.0, dtype=BFLOAT16)
    remainder = DenseRemainder(weight, transposed=False)
    remainder.rounded_off.fill_(-7)
    weight[:, ::2], weight[:, 1::2] = 0.0, -0.0
    lora_B, lora_A = torch.ones(rows, 1), torch.full((1, columns), 0.25)
    for _ in range(3):
        merge([remainder], [weight], [lora_B], [lora_A], torch.ones(1, 1, dtype=torch.float64))
    assert torch.equal(weight.float(), torch.full((rows, columns), 0.75))


@needs_compiler
@settings(max_examples=25, deadline=None)
@given(
    low=st.lists(st.integers(-(1 << 15), (1 << 15) - 1), min_size=37, max_size=37),
    added=st.sampled_from([0.0, 1e-40, 1e-3, -2.5, 3e38]),
    part=st.integers(0, 7),
)
def test_the_compiled_merge_rounds_every_bfloat16_like_pytorch(low, added, part):
    native.build()
    results = []
    for merge in (kernels.merge, operations.merge):
        weight, remainder = every_pair(BFLOAT16, torch.tensor(low, dtype=torch.int16))
        rows = slice(part << 13, (part + 1) << 13)
        weight, remainder.rounded_off = weight.data[rows], remainder.rounded_off[rows]
        lora_B, lora_A = torch.ones(len(weight), 1), torch.full((1, len(low)), added)
        merge([remainder], [weight], [lora_B], [lora_A], torch.ones(1, 1, dtype=torch.float64))
        results.append((weight, remainder.exact(weight)))
    (weight, exact), (other, other_exact) = results
    numbers = ~exact.isnan()
    assert torch.equal(numbers, ~other_exact.isnan())
    assert torch.equal(weight.isnan(), other.isnan())
    assert torch.equal(weight[numbers].view(torch.int16), other[numbers].view(torch.int16))
    assert same_bits(exact[numbers], other_exact[numbers])
