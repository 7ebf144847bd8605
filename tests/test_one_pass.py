"""Merges by the Triton kernel, in Triton's interpreter on a CPU: the bits of PyTorch's own operations, in one pass."""

import math
import sys
from functools import partial

import numpy
import pytest
import torch
from merge_speed import bytes_moved, floor_bytes
from merges_in_triton import (
    by_chance,
    bytes_read,
    dyadic,
    every_half,
    interpreter,
    layouts,
    of_rows,
    random_sums,
    tables,
)

from scalora.rescale import kernels, one_pass
from scalora.rescale.eight_bit import EightBitRemainder
from scalora.rescale.one_pass import Rounding, plan_of
from scalora.rescale.remainder import DenseRemainder
from scalora.rescale.stochastic import StochasticRemainder

# The interpreter of earlier ones fails with NumPy 2.4.
pytest.importorskip("triton", minversion="3.8")

BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
DTYPES = (BFLOAT16, FLOAT16, torch.float32)
KEPT = Rounding("kept", 16)

# Odd shapes, ranks below and above those of tensor cores, a rank that takes several blocks, transposed weights.
CASES = [(37, 140, 1, False), (70, 30, 3, True), (65, 129, 8, False), (130, 70, 16, True), (9, 100, 40, False)]


@pytest.fixture(scope="module")
def interpreted():
    with interpreter() as call:
        yield call


def numbers(bits, dtype):
    """Which of the numbers with these bits are numbers."""
    return ~torch.from_numpy(bits).view(dtype).isnan().numpy()


def same(found, expected, dtype):
    (weights, lows, _), (other_weights, other_lows, _) = found, expected
    assert len(weights) == len(other_weights) > 0
    assert len(lows) == len(other_lows)
    for index, (weight, other) in enumerate(zip(weights, other_weights, strict=True)):
        valid = numbers(other, dtype)
        assert numpy.array_equal(valid, numbers(weight, dtype))
        assert numpy.array_equal(weight[valid], other[valid])
        if lows:
            assert numpy.array_equal(lows[index][valid], other_lows[index][valid])


@pytest.mark.parametrize("kind", ["dense", "dense_8bit", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "r", "transposed"), [*CASES, (20, 70, 100, False)])
def test_the_kernel_merges_bit_for_bit_like_pytorch(interpreted, dtype, m, n, r, transposed, kind):
    found, expected, launches = interpreted(dyadic, dtype, m, n, r, kind, transposed)
    assert launches == 2  # of all layers, in each of two rescales
    same(found, expected, dtype)


@pytest.mark.parametrize("kind", ["dense", "dense_8bit", "stochastic"])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
@pytest.mark.parametrize("r", [2, 16])
def test_the_kernel_rounds_every_number_like_pytorch(interpreted, dtype, kind, r):
    lows = [0, 1, 0x1234, 0x7FFE, 0x7FFF, -0x8000, -0x7FFF, -0x5433, -2, -1]
    added = [
        0.0,
        2.0**-140,
        -(2.0**-24),
        2.0**-13,
        1.0,
        -3.0,
        2.0**9,
        65504.0,
        -1e38,
        3e38,
        math.inf,
        -math.inf,
        math.nan,
    ]
    if kind == "dense_8bit":
        lows = [0, 1, 2, 0x12, 0x40, 0x7E, 0x7F, -0x80, -0x7F, -0x54, -2, -1]
        # Sums that are a half, and a half and more, of an 8-bit step away from the next one.
        added += [2.0**-17, 2.0**-12 - 2.0**-17, 2.0**-9, -(2.0**-9), 2.0**-8 - 2.0**-16]
    elif dtype == FLOAT16:
        lows = [max(low, -0x7FFF) for low in lows]
    found, expected, launches = interpreted(every_half, dtype, lows, added, r, kind)
    assert launches == 1
    same(found, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [5, 24, 70])
def test_products_are_added_to_float32s_rounding(interpreted, dtype, r):
    joined, exact, launches = interpreted(random_sums, dtype, 40, 90, r)
    assert launches == 1
    assert numpy.abs(joined - exact).max() < 2e-6 * numpy.abs(exact).max()


def test_weights_that_the_kernel_can_not_take_are_left_to_pytorch(interpreted):
    counts = interpreted(layouts)
    assert counts == {name: (int(name == "plain"), True) for name in counts}


@pytest.mark.parametrize("kind", ["dense", "stochastic"])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
def test_rows_alone_are_merged_as_in_the_whole_weight(interpreted, dtype, kind):
    found, wanted, launches = interpreted(of_rows, dtype, kind)
    assert launches == 1
    assert numpy.array_equal(found, wanted)


def test_addresses_are_sent_to_the_device_once(interpreted):
    assert interpreted(tables) == 1


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
def test_another_process_draws_the_same_numbers(interpreted, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(30, 20, generator=generator).to(dtype)
    left, right = torch.randn(30, 2, generator=generator), torch.randn(20, 2, generator=generator)
    factors = weight.float().numpy(), left.numpy(), right.numpy()
    other = interpreted(by_chance, dtype, "layers.7.q_proj", 12, *factors)
    assert numpy.array_equal(by_chance(dtype, "layers.7.q_proj", 12, *factors), other)
    assert not numpy.array_equal(by_chance(dtype, "layers.7.q_proj", 13, *factors), other)


@pytest.mark.parametrize(("m", "n", "r"), [(128, 256, 8), (256, 128, 16), (100, 70, 40), (128, 64, 100)])
def test_the_plan_says_what_the_kernel_reads(interpreted, m, n, r):
    plan = plan_of(m, n, r, 2, BFLOAT16, KEPT)
    counts = interpreted(bytes_read, m, n, r, 2, outer=plan.block_k == 0)
    assert counts["weights"] == counts["written"] == 2 * 4 * m * n
    planned = plan.bytes_of_factors(r)
    # Tiles at the edges may not be full.
    whole = m % 128 == n % 64 == 0
    assert counts["factors"] == planned if whole else 0 < counts["factors"] < planned


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["dense", "dense_8bit", "stochastic"])
@pytest.mark.parametrize("r", [8, 16, 32, 64])
def test_a_merge_moves_little_more_than_every_byte_once(dtype, kind, r):
    # As many layers of one shape as a model of 7 billion parameters has.
    shape = 4096, 4096, r, 32, dtype
    # With three quarters or half of the bytes of a half-precision weight, the same factors are a larger share.
    beyond = bytes_moved(*shape, merge=kind) - floor_bytes(*shape, merge=kind)
    assert 0 < beyond <= 0.3 * floor_bytes(*shape)


@pytest.mark.parametrize("r", range(1, 321))
def test_every_entry_of_a_weight_is_in_one_tile(r):
    for rows, columns, layers in ((1, 1, 1), (100, 4099, 3), (4096, 4096, 32)):
        for dtype, rounding in (
            (BFLOAT16, KEPT),
            (BFLOAT16, Rounding("kept", 8)),
            (FLOAT16, Rounding("stochastic", 0)),
        ):
            plan = plan_of(rows, columns, r, layers, dtype, rounding)
            strips, in_strip = math.ceil(rows / plan.block_m), math.ceil(columns / plan.block_n)
            assert plan.grid == (strips * math.ceil(in_strip / plan.tiles), layers)
            assert 0 < plan.tiles < 2 * in_strip
            # As Triton needs them.
            assert all(size & (size - 1) == 0 for size in (plan.block_m, plan.block_n, plan.block_k))
            assert plan.block_k == 0 or plan.block_k >= 16


@pytest.fixture
def as_if_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(one_pass, "_GIVEN_UP", set())


def merged(r=2):
    weight = torch.zeros(16, 40, dtype=BFLOAT16)
    remainder = DenseRemainder(weight, transposed=False)
    kernels.merge([remainder], [weight], [torch.ones(16, r)], [torch.ones(r, 40)], torch.ones(1, r).double())
    return bool((weight == r).all())


def test_without_triton_merges_are_pytorchs_with_one_warning(as_if_interpreted, monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, "scalora.rescale.triton_kernels", None)
    assert all(merged(r) for r in (2, 2, 3))
    (warning,) = recwarn.list
    assert "because the Triton kernel can't be used (ModuleNotFoundError" in str(warning.message)


def test_what_can_not_be_compiled_is_named_and_not_tried_again(as_if_interpreted, monkeypatch, recwarn):
    tried = []

    def fails(remainders, weights, lora_B, *_):
        tried.append(lora_B.shape[-1])
        raise RuntimeError("ptxas is missing\nand more")

    monkeypatch.setattr(one_pass, "_launch", fails)
    assert all(merged(r) for r in (2, 2, 3, 2, 3))
    assert tried == [2, 3]
    assert [str(w.message)[:44] for w in recwarn] == [f"merges into bfloat16 weights at rank {r} take " for r in (2, 3)]
    assert "RuntimeError: ptxas is missing)" in str(recwarn[0].message)


@pytest.mark.slow
def test_a_tensor_on_a_cpu_is_not_for_triton(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(one_pass, "_launch", lambda *_: pytest.fail("launched"))
    assert merged()


@pytest.mark.slow
@pytest.mark.parametrize("other", [EightBitRemainder, partial(StochasticRemainder, name="1")])
def test_kinds_of_remainders_are_not_mixed_in_a_launch(as_if_interpreted, monkeypatch, other):
    monkeypatch.setattr(one_pass, "_launch", lambda *_: pytest.fail("launched"))
    weights = [torch.zeros(16, 40, dtype=BFLOAT16) for _ in range(2)]
    remainders = [
        DenseRemainder(weights[0], transposed=False),
        other(weights[1], transposed=False),
    ]
    kernels.merge(remainders, weights, [torch.ones(16, 2)] * 2, [torch.ones(2, 40)] * 2, torch.ones(2, 2).double())
    assert all((weight == 2).all() for weight in weights)
