"""The merge in one pass on a GPU, beside the same on the CPU: ``pytest -m gpu``. Skipped where there is none."""

import copy
import warnings

import pytest
import torch
from models import TwoLayers, trainable, with_lora
from torch import nn

from scalora import ScaLora, ScaLoraConfig
from scalora.rescale import kernels, one_pass
from scalora.rescale.eight_bit import EightBitRemainder
from scalora.rescale.remainder import DenseRemainder
from scalora.rescale.stochastic import StochasticRemainder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RANKS = (1, 8, 15, 16, 40, 64, 320)


def merge_case(dtype, m, n, r, *, kind="dense", transposed=False, layers=3, dyadic=False):
    """Remainders and weights on the CPU, with the arguments of a merge."""
    generator = torch.Generator().manual_seed(r)
    shape = (n, m) if transposed else (m, n)
    powers = 2.0 ** torch.randint(-20, 4, (layers, *shape), generator=generator)
    weights = [weight.to(dtype) for weight in torch.randn(layers, *shape, generator=generator) * powers]
    kinds = {"dense": DenseRemainder, "dense_8bit": EightBitRemainder}
    remainders = [
        StochasticRemainder(weight, transposed=transposed, name=f"layers.{number}")
        if kind == "stochastic"
        else kinds[kind](weight, transposed=transposed)
        for number, weight in enumerate(weights)
    ]
    for remainder in remainders:
        if (low := remainder.rounded_off) is not None:
            most = torch.iinfo(low.dtype).max
            low.copy_(torch.randint(-most, most + 1, shape, generator=generator))
    if dyadic:  # sums are exact in float32, in any order and in three products of TF32
        lora_B, lora_A = (torch.randint(-8, 9, (layers, *s), generator=generator) / 64 for s in ((m, r), (r, n)))
        coefficients = torch.randint(-2, 3, (layers, r), generator=generator).double() / 2
    else:
        lora_B, lora_A = (torch.randn(layers, *s, generator=generator) for s in ((m, r), (r, n)))
        coefficients = torch.rand(layers, r, generator=generator, dtype=torch.float64) / r**0.5
    return remainders, weights, list(lora_B), list(lora_A), coefficients


def on_gpu(remainders, weights, lora_B, lora_A, coefficients):
    moved = [weight.cuda() for weight in weights]
    return (
        [copy.deepcopy(remainder).cuda() for remainder in remainders],
        moved,
        [factor.cuda() for factor in lora_B],
        [factor.cuda() for factor in lora_A],
        coefficients.cuda(),
    )


def merge_in_one_sum(remainders, weights, lora_B, lora_A, coefficients):
    """A merge that adds to each entry once: a product may begin with the weight's entry and be rounded many times."""
    products = [(B.double() * c @ A.double()).float() for B, A, c in zip(lora_B, lora_A, coefficients, strict=True)]
    n = products[0].shape[1]
    kernels.merge(remainders, weights, products, [torch.eye(n)] * len(products), torch.ones(len(products), n))


@pytest.fixture
def launches(monkeypatch):
    """The launches of the kernel. A merge that PyTorch's operations did in its place fails the test."""
    made, launch = [], one_pass._launch
    monkeypatch.setattr(one_pass, "_launch", lambda *args: (made.append(len(args[0])), launch(*args)))
    monkeypatch.setattr(one_pass, "_GIVEN_UP", set())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="merges into")
        yield made


@pytest.mark.parametrize("kind", ["dense", "dense_8bit", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("r", RANKS)
def test_the_kernel_has_the_bits_of_the_cpu_where_sums_are_exact(launches, dtype, kind, r):
    for m, n, transposed in ((100, 300, False), (256, 131, True), (1, 513, False)):
        case = merge_case(dtype, m, n, r, kind=kind, transposed=transposed, dyadic=True)
        moved = on_gpu(*case)
        for step in (1, 16, 1000):
            for remainder in (*case[0], *moved[0]):
                remainder.step = step
            merge_in_one_sum(*case)
            kernels.merge(*moved)
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        for number, (weight, other) in enumerate(zip(case[1], moved[1], strict=True)):
            assert torch.equal(weight.view(bits), other.cpu().view(bits))
            if (low := case[0][number].rounded_off) is not None:
                assert torch.equal(low, moved[0][number].rounded_off.cpu())
    assert launches == [3] * 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("r", RANKS)
def test_the_kernel_adds_products_to_float32s_rounding(launches, dtype, r):
    case = merge_case(dtype, 700, 1100, r)
    exact = [
        remainder.exact(weight).double() + (B.double() * c) @ A.double()
        for remainder, weight, B, A, c in zip(*case, strict=True)
    ]
    remainders, weights, *_ = moved = on_gpu(*case)
    kernels.merge(*moved)
    assert launches == [3]
    for remainder, weight, wanted in zip(remainders, weights, exact, strict=True):
        error = remainder.exact(weight).cpu().double() - wanted
        assert error.abs().max() < 2e-6 * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["dense", "dense_8bit", "stochastic"])
def test_the_kernel_rounds_every_number_like_the_cpu(launches, dtype, kind):
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
    added = torch.tensor([0.0, 2.0**-140, -(2.0**-24), 1.0, -3.0, 65504.0, -1e38, torch.inf, torch.nan, 2.0**-13])
    case = merge_case(dtype, 256, 256, 1, kind=kind, layers=1)
    case[1][0].copy_(numbers)
    case[2][0].copy_(added.repeat(26)[:256, None])
    case[3][0].fill_(1)
    case[4].fill_(1)
    moved = on_gpu(*case)
    kernels.merge(*case)
    kernels.merge(*moved)
    assert launches == [1]
    (weight,), (other,) = case[1], moved[1]
    valid = ~weight.isnan()
    assert torch.equal(valid, ~other.cpu().isnan())
    assert torch.equal(weight.view(torch.int16)[valid], other.cpu().view(torch.int16)[valid])
    if kind != "stochastic":
        assert torch.equal(case[0][0].rounded_off[valid], moved[0][0].rounded_off.cpu()[valid])


@pytest.mark.parametrize("r", [8, 64])
def test_a_merge_can_be_captured_in_a_graph(launches, r):
    case = merge_case(torch.bfloat16, 256, 384, r, dyadic=True)
    moved = on_gpu(*case)
    for _ in range(3):
        kernels.merge(*case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        kernels.merge(*moved)  # compiles, and sends the addresses
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.merge(*moved)
    graph.replay()
    graph.replay()
    for weight, other in zip(case[1], moved[1], strict=True):
        assert torch.equal(weight, other.cpu())


@pytest.mark.parametrize("merge", ["dense", "dense_8bit", "stochastic"])
def test_a_rescale_of_a_half_precision_model_is_one_launch_for_each_shape(launches, merge):
    model = with_lora(TwoLayers(), r=3, target_modules=["first", "second"]).to("cuda")
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, fused=True)
    engine = ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0, merge=merge))
    for pair in engine.pairs:
        pair.layer.get_base_layer().bfloat16()
    x, y = torch.randn(32, 12).cuda(), torch.randn(32, 6).cuda()
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            loss = nn.functional.mse_loss(model(x).float(), y)
        loss.backward()
        launches.clear()
        engine.optimizer.step()
        engine.optimizer.zero_grad()
        assert launches == [1, 1]
    assert engine.metrics()["scalora/rescales"] == 3
