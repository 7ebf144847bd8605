"""The C++ kernels against PyTorch's operations and float64, and the engine with them."""

import pytest
import torch
from conftest import NO_COMPILER
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Mixed, tiny_llama, trainable, with_lora
from test_rescale_cost import rescale
from torch import nn

from scalora import ScaLora, ScaLoraConfig
from scalora.rescale import kernels, native
from scalora.rescale.eight_bit import EightBitRemainder
from scalora.rescale.native import operations
from scalora.rescale.remainder import DenseRemainder

if NO_COMPILER:
    pytest.skip("no C++ compiler: install one (Debian: apt-get install g++)", allow_module_level=True)

# Around the sizes of a vector (16), of rows that are taken together (4) and of a tile (256).
SIZES = st.sampled_from([1, 3, 4, 5, 15, 16, 17, 33, 64, 255, 257, 300])
LAYERS = st.fixed_dictionaries(
    {"layers": st.integers(1, 5), "m": SIZES, "n": SIZES, "r": st.sampled_from([1, 2, 3, 4, 8, 11, 16])}
)


@pytest.fixture(scope="module", autouse=True)
def built():
    native.build()


@pytest.fixture(autouse=True, params=[1, 3], ids=["one-thread", "three-threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def adapters(layers, m, n, r, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return [torch.randn(shape, generator=generator) for _ in range(layers)]

    return randn(m, r), randn(m, r), randn(r, n), randn(r, n)


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def test_a_process_may_have_no_rows_of_a_matrix():
    lora_B, grad_B, lora_A, grad_A = adapters(layers=2, m=0, n=5, r=2)
    found = operations.grams(lora_B, grad_B, lora_A, grad_A)
    assert not found.left.any()
    assert found.right.any()
    weights = [torch.zeros(0, 5), torch.zeros(0, 5)]
    remainders = [DenseRemainder(weight, transposed=False) for weight in weights]
    operations.merge(remainders, weights, lora_B, lora_A, torch.ones(2, 2, dtype=torch.float64))
    no_rows = [torch.zeros(0, 5), torch.zeros(0, 5)]
    operations.multiply(no_rows, operations.expand_factors(torch.ones(2, 0, 1), no_rows))
    operations.multiply(lora_B, operations.expand_factors(torch.ones(2, 1, 2), lora_B))
    assert all(tensor.shape == (0, 5) for tensor in (*weights, *no_rows))


@settings(max_examples=60, deadline=None)
@given(LAYERS)
def test_grams(shape):
    given_tensors = adapters(**shape)
    for found, wanted in zip(operations.grams(*given_tensors), kernels.grams(*given_tensors), strict=True):
        assert found.dtype == wanted.dtype == torch.float64
        assert relative(found, wanted) < 1e-13


def test_grams_of_what_is_not_finite_are_not_finite():
    lora_B, grad_B, lora_A, grad_A = adapters(2, 7, 20, 3)
    grad_B[1][6, 2] = float("nan")
    lora_A[1][0, 19] = float("inf")
    left, right = operations.grams(lora_B, grad_B, lora_A, grad_A)
    assert left[0].isfinite().all()
    assert right[0].isfinite().all()
    assert left[1, 5].isnan().all()
    assert not right[1, 3].isfinite().any()


@settings(max_examples=60, deadline=None)
@given(LAYERS, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 3))
def test_a_merge_is_exact_up_to_the_rounding_of_float32(shape, dtype, seed):
    lora_B, _, lora_A, _ = adapters(**shape, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape["m"], shape["n"], generator=generator).to(dtype) for _ in lora_B]
    coefficients = torch.rand(len(lora_B), shape["r"], generator=generator, dtype=torch.float64) - 0.5
    remainders = [DenseRemainder(weight, transposed=False) for weight in weights]
    before = [weight.double() for weight in weights]
    for _ in range(3):
        operations.merge(remainders, weights, lora_B, lora_A, coefficients)
    for weight, remainder, start, B, A, c in zip(
        weights, remainders, before, lora_B, lora_A, coefficients, strict=True
    ):
        exact = remainder.exact(weight)
        size = start.abs() + 3 * (B.double().abs() * c.abs()) @ A.double().abs()
        # The largest error that so many roundings can make.
        bound = 3 * (shape["r"] + 3) * 2**-24 * size
        assert ((exact - start - 3 * (B.double() * c) @ A.double()).abs() <= bound).all()
        # The weight itself is the nearest that its dtype has to what is kept.
        error, nearest = (weight.double() - exact).abs(), (exact.to(dtype).double() - exact).abs()
        assert torch.equal(error, nearest)


@pytest.mark.parametrize("became", [torch.bfloat16, torch.float32])
def test_rounding_errors_of_8_bits_are_left_to_pytorch(became):
    lora_B, _, lora_A, _ = adapters(2, 9, 37, 4)
    coefficients = torch.rand(2, 4, dtype=torch.float64)
    results = []
    for merge in (kernels.merge, operations.merge):
        weights = [torch.linspace(-3, 3, 9 * 37).view(9, 37).bfloat16() for _ in lora_B]
        remainders = [EightBitRemainder(weight, transposed=False) for weight in weights]
        for remainder in remainders:
            remainder.rounded_off.fill_(-77)
        # The remainders have not been told yet if the weights have become float32.
        weights = [weight.to(became) for weight in weights]
        merge(remainders, weights, lora_B, lora_A, coefficients)
        results.append([r.exact(w) for r, w in zip(remainders, weights, strict=True)])
        assert all(remainder.changed for remainder in remainders)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_column_that_moves_nothing_is_left_out_whatever_it_holds(dtype):
    lora_B, _, lora_A, _ = adapters(2, 9, 37, 4)
    lora_B[0][:, 1], lora_A[0][1] = float("nan"), float("inf")
    lora_B[1].fill_(float("nan"))
    coefficients = torch.rand(2, 4, dtype=torch.float64)
    coefficients[0, 1], coefficients[1] = 0, 0
    weights = [torch.randn(9, 37).to(dtype) for _ in lora_B]
    before = [weight.double() for weight in weights]
    remainders = [DenseRemainder(weight, transposed=False) for weight in weights]
    operations.merge(remainders, weights, lora_B, lora_A, coefficients)
    rest = [0, 2, 3]
    wanted = before[0] + (lora_B[0][:, rest].double() * coefficients[0, rest]) @ lora_A[0][rest].double()
    assert relative(remainders[0].exact(weights[0]).double(), wanted) < 1e-6
    assert torch.equal(weights[1].double(), before[1])


@settings(max_examples=60, deadline=None)
@given(LAYERS, st.integers(1, 3), st.booleans())
def test_multiplication_is_that_of_pytorch_to_the_last_bit(shape, power, by_column):
    tensors, factors, _, _ = adapters(**shape)
    factors = torch.stack(factors)[:, :1] if by_column else torch.stack(factors)[:, :, :1]
    wanted = [tensor.clone() for tensor in tensors]
    operations.multiply(tensors, operations.expand_factors(factors, tensors), power)
    kernels.multiply(wanted, kernels.expand_factors(factors, wanted), power)
    for found, target in zip(tensors, wanted, strict=True):
        assert torch.equal(found, target)


def train(use_native, steps=30, base=None, dtype=torch.float32, **config):
    """A tiny model after some rescales, its optimizer and the engine."""
    model = with_lora(base or tiny_llama(), r=3, target_modules="all-linear")
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0, native=use_native, **config))
    tokens = torch.randint(0, 64, (4, 10), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, engine


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["dense", "factored"])
def test_a_run_is_the_same_with_them(merge):
    (plain, plain_optimizer, plain_engine), (model, optimizer, engine) = (
        train(use_native, merge=merge, target_norm=0.3) for use_native in (False, True)
    )
    assert engine.metrics()["scalora/left_alone_share"] == 0
    assert engine.metrics() == pytest.approx(plain_engine.metrics(), rel=1e-3)
    for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert relative(found, wanted) < 1e-3
        for key, value in optimizer.state[found].items() if found.requires_grad else ():
            assert relative(value, plain_optimizer.state[wanted][key]) < 1e-2
    changed = {
        name for name, p in model.named_parameters() if "base_layer" in name and p.ne(dict(start()).get(name)).any()
    }
    assert len(changed) == (14 if merge == "dense" else 0)


def start():
    return with_lora(tiny_llama(), r=3, target_modules="all-linear").named_parameters()


def test_the_function_is_kept_in_bfloat16_as_without_them():
    one_step = {use_native: train(use_native, steps=1, dtype=torch.bfloat16) for use_native in (False, True)}
    for found, wanted in zip(
        *(engine.state_dict()["tensors"].items() for _, _, engine in one_step.values()), strict=True
    ):
        assert found[0] == wanted[0]
        if found[1].dtype == torch.bfloat16:
            # Where the sum is within float32's rounding of the middle of two, either is right.
            assert (found[1] != wanted[1]).float().mean() < 1e-3
        elif found[1].is_floating_point():
            assert relative(found[1], wanted[1]) < 1e-5


def test_what_they_cannot_do_is_left_to_pytorch():
    """A transposed weight, an embedding, an adapter in float64."""
    found, wanted = [], []
    for use_native, kept in ((True, found), (False, wanted)):
        model = with_lora(Mixed(), r=2, dtype=torch.float64, target_modules=["embed", "conv1d", "linear"])
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0, native=use_native))
        tokens = torch.randint(0, 20, (8, 5), generator=torch.Generator().manual_seed(0))
        for _ in range(3):
            nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten() % 3).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert engine.metrics()["scalora/rescales"] == 3
        kept += model.state_dict().values()
    assert all(map(torch.equal, found, wanted))


def test_a_run_goes_on_without_what_it_began_with():
    _, _, engine = train(use_native=True, steps=4)
    model, _, plain = train(use_native=False, steps=0)
    plain.load_state_dict(engine.state_dict())
    assert plain.metrics() == {}
    assert plain.state_dict()["step"] == 4
    assert any("lora_A" in name for name, _ in model.named_parameters())


@pytest.mark.slow
def test_no_number_of_operations_grows_with_the_layers():
    config = ScaLoraConfig(warmup_steps=0, native=True)
    few, many = rescale(2, config).count, rescale(6, config).count
    assert few["merge_"] > 0
    assert few == many
