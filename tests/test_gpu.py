"""What only a GPU shows: ``pytest -m gpu``. Skipped where there is none.

``GPU_TESTS_ON=cpu`` runs on the CPU what does not need CUDA itself: to debug the tests, which then compare it with
itself. They import neither the command's libraries nor beartype, so that they run wherever torch and PEFT are:
``pytest -o addopts= -m gpu tests/test_gpu.py tests/test_gpu_merges.py``.
"""

import copy
import os
import threading
from typing import get_args

import pytest
import torch
from models import TwoLayers, trainable, with_lora
from peft import LoraConfig, get_peft_model
from torch import nn

from scalora import PairAdamW, ScaLora, ScaLoraConfig, UnsupportedOptimizerError, add_block_signs
from scalora.config import Merge
from scalora.model.adapters import find_lora_pairs
from scalora.rescale.remainder import DenseRemainder, FactoredRemainder
from scalora.rescale.replay import launched_one_by_one

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")
ON_CUDA = DEVICE == "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_CUDA and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_cuda = pytest.mark.skipif(not ON_CUDA, reason="needs CUDA itself")

MERGES = [merge for merge in get_args(Merge) if merge != "auto"]

# Those that are exact to float32 in half precision: neither up to chance nor to 8 bits.
EXACT_IN_HALF = ["dense", "factored"]


def sgd(model, **settings):
    return torch.optim.SGD(trainable(model), lr=1e-2, momentum=0.9, **settings)


def adamw(model, **settings):
    return torch.optim.AdamW(trainable(model), lr=1e-2, **settings)


OPTIMIZERS = {
    "AdamW": adamw,
    "fused AdamW": lambda model: adamw(model, fused=True),
    "SGD with momentum": sgd,
    "PairAdamW": lambda model: PairAdamW(model, lr=1e-2),
}
COLUMNS = [("auto", "AdamW"), ("auto", "fused AdamW"), ("auto", "SGD with momentum"), ("auto", "PairAdamW")]
MODES = [*COLUMNS, ("column", "fused AdamW"), ("scalar", "fused AdamW")]
MATRICES = [("matrix", "PairAdamW"), ("matrix", "SGD with momentum")]


def adapted(dtype=torch.float32):
    return with_lora(TwoLayers(), dtype=dtype, r=3, target_modules=["first", "second"])


def attach(model, optimizer, **settings):
    norm = {"target_norm": 0.5} if settings.get("mode") == "matrix" and optimizer != "PairAdamW" else {}
    return ScaLora(model, OPTIMIZERS[optimizer](model), ScaLoraConfig(**{"warmup_steps": 2} | norm | settings))


def batch(device, dtype):
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(32, n, generator=generator, dtype=dtype).to(device) for n in (12, 6))


def take_steps(model, engine, data, steps):
    x, y = data
    for _ in range(steps):
        nn.functional.mse_loss(model(x), y).backward()
        engine.optimizer.step()
        engine.optimizer.zero_grad()


def train(device, dtype, optimizer="fused AdamW", steps=30, **settings):
    model = adapted(dtype).to(device)
    engine = attach(model, optimizer, **settings)
    data = batch(device, dtype)
    take_steps(model, engine, data, steps)
    return model, engine, data


def effective_weights(model):
    for pair in find_lora_pairs(model):
        if isinstance(pair.remainder, FactoredRemainder):
            merged = pair.oriented(pair.weight).double() + pair.remainder.dense().double()
        else:
            merged = pair.oriented(pair.remainder.exact(pair.weight)).double()
        yield (merged + pair.scaling * pair.lora_B.double() @ pair.lora_A.double()).detach().cpu()


def assert_near(one, other, bound):
    for expected, found in zip(effective_weights(one), effective_weights(other), strict=True):
        assert (found - expected).norm() < bound * expected.norm()


def assert_equal(one, other):
    expected = other.state_dict()
    for key, value in one.state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize(("mode", "optimizer"), [*MODES, *MATRICES])
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_training_is_that_of_the_cpu(dtype, bound, merge, mode, optimizer):
    of_cpu, *_ = train("cpu", dtype, optimizer, merge=merge, mode=mode)
    of_gpu, engine, _ = train(DEVICE, dtype, optimizer, merge=merge, mode=mode)
    assert engine.metrics()["scalora/rescales"] == 28
    assert engine.metrics()["scalora/left_alone_share"] < 1
    assert_near(of_cpu, of_gpu, bound)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_training_with_block_signs_is_that_of_the_cpu(dtype, bound, autocast):
    if autocast and dtype == torch.float64:
        pytest.skip("autocast leaves float64 alone")

    def trained(device):
        torch.manual_seed(0)
        config = LoraConfig(r=3, target_modules=["first", "second"])
        model = get_peft_model(TwoLayers(16, 32, 8), config).to(device, dtype)
        add_block_signs(model, 4)
        optimizer, generator = PairAdamW(model, lr=1e-2), torch.Generator().manual_seed(1)
        x, y = (torch.randn(32, n, generator=generator, dtype=dtype).to(device) for n in (16, 8))
        for _ in range(10):
            with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
                output = model(x)
            nn.functional.mse_loss(output.to(dtype), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        layers = [model.base_model.model.first, model.base_model.model.second]
        return [layer.get_delta_weight("default").detach().double().cpu() for layer in layers]

    for of_cpu, of_gpu in zip(trained("cpu"), trained(DEVICE), strict=True):
        assert (of_gpu - of_cpu).norm() < (0.2 if autocast else bound) * of_cpu.norm()


def test_the_exact_optimum_over_matrices_is_that_of_the_cpu():
    of_cpu, *_ = train("cpu", torch.float64, "PairAdamW", mode="matrix", optimum="exact", merge="dense", steps=10)
    of_gpu, *_ = train(DEVICE, torch.float64, "PairAdamW", mode="matrix", optimum="exact", merge="dense", steps=10)
    assert_near(of_cpu, of_gpu, 1e-9)


def test_compressions_of_a_factored_remainder_are_those_of_the_cpu():
    of_cpu, of_gpu = (train(device, torch.float64, merge="factored", remainder_rank=8)[0] for device in ("cpu", DEVICE))
    for pair in find_lora_pairs(of_gpu):
        assert pair.remainder.columns < 28 * 3
    assert_near(of_cpu, of_gpu, 1e-7)


def rescaled(device, dtype, merge, mode, optimizer, *, steps=8, **settings):
    """A model after rescales, from the third step on, with gradients that are the same on all devices."""
    torch.manual_seed(0)
    model = get_peft_model(TwoLayers().to(dtype), LoraConfig(r=3, target_modules=["first", "second"])).to(device)
    engine = attach(model, optimizer, merge=merge, mode=mode, **settings)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        for parameter in trainable(model):
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
        engine.optimizer.step()
    assert engine.metrics()["scalora/rescales"] == steps - 2
    return model


@pytest.mark.parametrize(("mode", "optimizer"), [*MODES[1:], *MATRICES])
@pytest.mark.parametrize("merge", EXACT_IN_HALF)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rescales_of_a_half_precision_base_are_those_of_the_cpu(dtype, merge, mode, optimizer):
    of_cpu, of_gpu = (rescaled(device, dtype, merge, mode, optimizer) for device in ("cpu", DEVICE))
    assert_near(of_cpu, of_gpu, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_merges_do_not_drift(dtype):
    torch.manual_seed(0)
    weight = torch.randn(512, 768).to(dtype).to(DEVICE)
    left, right = 1e-3 * torch.randn(512, 8).to(DEVICE), torch.randn(768, 8).to(DEVICE)
    remainder, exact = DenseRemainder(weight, transposed=False), weight.double()
    for _ in range(50):
        remainder.add(weight, left, right)
        exact += left.double() @ right.double().mT
    assert (remainder.exact(weight).double() - exact).norm() < 1e-5 * exact.norm()
    rounded_off = (remainder.exact(weight) - weight.float()).abs()
    assert (rounded_off <= torch.finfo(dtype).eps * weight.float().abs() + torch.finfo(dtype).smallest_normal).all()


@pytest.mark.parametrize(("mode", "optimizer"), [("auto", "fused AdamW"), *MATRICES])
@pytest.mark.parametrize("merge", MERGES)
def test_a_resumed_run_ends_with_the_same_weights_to_the_bit(merge, mode, optimizer):
    whole, engine, data = train(DEVICE, torch.float32, optimizer, steps=8, merge=merge, mode=mode)
    state = copy.deepcopy(engine.state_dict())
    take_steps(whole, engine, data, 8)
    resumed = adapted().to(DEVICE)
    engine = attach(resumed, optimizer, merge=merge, mode=mode)
    engine.load_state_dict(state)
    take_steps(resumed, engine, data, 8)
    assert engine.step == 16
    assert_equal(resumed, whole)


@needs_cuda
@pytest.mark.parametrize(("mode", "optimizer"), [*MODES, *MATRICES])
@pytest.mark.parametrize("merge", MERGES)
def test_a_step_with_a_rescale_waits_for_nothing(merge, mode, optimizer):
    """Neither one that is launched, nor the one that is recorded, nor those that replay it."""
    model, engine, (x, y) = train(DEVICE, torch.float32, optimizer, steps=4, merge=merge, mode=mode)
    for _ in range(4):
        nn.functional.mse_loss(model(x), y).backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            engine.optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        engine.optimizer.zero_grad()
    assert engine.metrics()["scalora/rescales"] == 6


@pytest.fixture
def launches(monkeypatch):
    """A list with an entry for each launch of a graph."""
    made = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (made.append(1), replay(graph)))
    return made


@needs_cuda
@pytest.mark.parametrize(("mode", "optimizer"), [*MODES, *MATRICES])
@pytest.mark.parametrize(
    ("dtype", "merge"), [(torch.float32, "dense"), (torch.bfloat16, "dense"), (torch.bfloat16, "stochastic")]
)
def test_a_run_with_replays_ends_as_one_without_to_the_bit(dtype, merge, mode, optimizer, launches):
    found = rescaled(DEVICE, dtype, merge, mode, optimizer)
    # Of 6 rescales and 8 steps; the first two alike are not replayed.
    assert len(launches) == (4 + 6 if optimizer == "PairAdamW" else 4)
    with launched_one_by_one():
        wanted = rescaled(DEVICE, dtype, merge, mode, optimizer)
    assert_equal(found, wanted)


@needs_cuda
@pytest.mark.parametrize(("mode", "optimizer"), [*MODES, *MATRICES])
def test_each_place_that_a_factored_remainder_fills_is_replayed_to_the_bit(mode, optimizer, launches):
    settings = {"steps": 14, "remainder_rank": 3}
    found = rescaled(DEVICE, torch.bfloat16, "factored", mode, optimizer, **settings)
    # Of 12 rescales the first fills the columns 1 to 3, six 4 to 6, and five 7 to 9, before a compression to 3.
    assert len(launches) == (4 + 3 + 12 if optimizer == "PairAdamW" else 4 + 3)
    with launched_one_by_one():
        wanted = rescaled(DEVICE, torch.bfloat16, "factored", mode, optimizer, **settings)
    assert_equal(found, wanted)


@needs_cuda
def test_a_recording_that_keeps_too_much_memory_is_given_up(monkeypatch):
    expected, *_ = train(DEVICE, torch.float32, "PairAdamW", steps=8, mode="matrix", merge="dense")
    monkeypatch.setattr("scalora.rescale.replay._MOST_MEMORY", 0)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: pytest.fail("it has been replayed"))
    found, *_ = train(DEVICE, torch.float32, "PairAdamW", steps=8, mode="matrix", merge="dense")
    assert_equal(found, expected)


@needs_cuda
def test_replays_survive_other_work_on_the_device_and_in_other_threads():
    """Memory that is freed and used again, an emptied cache, another stream, copies in a thread."""
    plain, *_ = train(DEVICE, torch.float32, "PairAdamW", steps=40, mode="matrix", merge="dense")
    model = adapted().to(DEVICE)
    engine, data = attach(model, "PairAdamW", mode="matrix", merge="dense"), batch(DEVICE, torch.float32)
    ended = threading.Event()

    def copy_around():
        while not ended.is_set():
            torch.randn(1000).pin_memory().to(DEVICE, non_blocking=True)

    thread = threading.Thread(target=copy_around)
    thread.start()
    try:
        for _ in range(40):
            take_steps(model, engine, data, 1)
            torch.randn(1 << 20, device=DEVICE)
            torch.cuda.empty_cache()
    finally:
        ended.set()
        thread.join()
    for key, value in model.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key]), key


@needs_cuda
def test_a_step_that_the_grad_scaler_skips_does_not_count():
    model, engine, (x, y) = train(DEVICE, torch.float32, merge="dense", steps=3)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    counts = []
    for spoilt in (False, True, False):
        with torch.autocast("cuda", torch.float16):
            loss = nn.functional.mse_loss(model(x).float(), y)
        scaler.scale(loss).backward()
        if spoilt:
            model.base_model.model.first.lora_A["default"].weight.grad[0, 0] = torch.inf
        scaler.step(engine.optimizer)
        scaler.update()
        engine.optimizer.zero_grad()
        counts.append(engine.metrics()["scalora/rescales"])
    assert counts == [2, 2, 3]


@pytest.mark.usefixtures("without_shape_checks")  # torch.compile can't trace them
@pytest.mark.parametrize("merge", MERGES)
def test_a_compiled_model_trains_as_an_eager_one(merge):
    eager, *_ = train(DEVICE, torch.float32, steps=12, merge=merge)
    model = adapted().to(DEVICE)
    engine = attach(model, "fused AdamW", merge=merge)
    compiled = torch.compile(model, backend="inductor" if ON_CUDA else "eager")
    take_steps(compiled, engine, batch(DEVICE, torch.float32), 12)
    assert engine.metrics()["scalora/rescales"] == 10
    assert_near(eager, model, 1e-4)


@needs_cuda
@pytest.mark.parametrize("merge", ["dense", "factored"])
def test_forward_and_backward_passes_in_a_graph_train_as_eager_ones_and_a_step_in_one_is_refused(merge):
    """A factored remainder fills after the capture; the host, which a replay does not ask, knows how far."""
    eager, *_ = train(DEVICE, torch.float32, steps=12, merge=merge)
    model, data = adapted().to(DEVICE), batch(DEVICE, torch.float32)
    engine = attach(model, "fused AdamW", merge=merge)
    torch.cuda.make_graphed_callables(model, (data[0],))
    take_steps(model, engine, data, 12)
    assert engine.metrics()["scalora/rescales"] == 10
    assert_near(eager, model, 1e-4)
    with pytest.raises(UnsupportedOptimizerError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        engine.optimizer.step()


@needs_cuda
def test_a_step_of_the_pair_optimizer_in_a_graph_is_refused():
    model = adapted().to(DEVICE)
    optimizer = PairAdamW(model, lr=1e-2)
    for parameter in trainable(model):
        parameter.grad = torch.randn_like(parameter)
    with pytest.raises(RuntimeError, match="count of steps"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
