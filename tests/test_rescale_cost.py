"""What a rescale asks of the machine: operations, device-to-host copies, temporaries."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from models import tiny_llama, trainable, with_lora
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from scalora import PairAdamW, ScaLora, ScaLoraConfig
from scalora.rescale.remainder import DenseRemainder
from scalora.runs.measure import StepClock


class Operations(TorchDispatchMode):
    """Counts what reaches the device: views are bookkeeping of the host."""

    def __init__(self):
        super().__init__()
        self.count = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten.detach.default:
            self.count[func.overloadpacket.__name__] += 1
            if isinstance(out, torch.Tensor) and not any(out is arg for arg in args):
                self.largest = max(self.largest, out.numel())
        return out


# Decompositions after which the host waits for a GPU to ask whether they have succeeded. Whatever else waits, for a
# value or for a shape that depends on values, fails on the device without values.
WAITING = {"_linalg_eigh", "_linalg_svd", "linalg_lstsq", "linalg_cholesky", "linalg_inv", "linalg_eig"}


def rescale(layers, config=None, **settings):
    """The operations of one rescale of a Llama with so many layers, after the moments are there."""
    model = with_lora(tiny_llama(num_hidden_layers=layers, **settings), r=4, target_modules="all-linear")
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    operations, step = Operations(), 0

    def begin(*_):
        nonlocal step
        step += 1
        if step == 2:
            operations.__enter__()

    def end(*_):
        if step == 2:
            operations.__exit__(None, None, None)

    # Around the engine's hook, and before the optimizer's own step.
    optimizer.register_step_pre_hook(begin)
    engine = ScaLora(model, optimizer, config or ScaLoraConfig(warmup_steps=0))
    optimizer.register_step_pre_hook(end)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        for parameter in trainable(model):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    assert engine.metrics()["scalora/rescales"] == 2
    assert engine.metrics()["scalora/left_alone_share"] < 1
    return operations


@pytest.mark.slow
def test_the_number_of_operations_does_not_grow_with_the_layers_save_one_merge_for_each_weight():
    few, many = rescale(2).count, rescale(6).count
    linear_layers = 7
    assert (few.pop("addmm_"), many.pop("addmm_")) == (2 * linear_layers, 6 * linear_layers)
    assert sum(few.values()) > 0
    assert few == many


@pytest.mark.slow
def test_factored_remainders_of_all_layers_are_compressed_together():
    # The second rescale's columns are too many.
    config = ScaLoraConfig(warmup_steps=0, merge="factored", remainder_rank=3)
    few, many = rescale(2, config).count, rescale(6, config).count
    assert 0 < few["_linalg_eigh"] == many["_linalg_eigh"] == 1
    assert few == many


@pytest.mark.parametrize("shapes", [1, 3])
def test_the_small_matrices_of_all_shapes_go_through_one_decomposition(shapes):
    """By matrices with PairAdamW: two roots in a step, of the factors and of the moments, and one whitening."""
    model = nn.ModuleDict({f"layer{i}": nn.Linear(8 * i + 8, 16, bias=False) for i in range(shapes)})
    model = with_lora(model, r=4, target_modules=list(model))
    optimizer = PairAdamW(model, lr=1e-3)
    ScaLora(model, optimizer, ScaLoraConfig(mode="matrix", warmup_steps=0))
    for _ in range(2):
        for parameter in trainable(model):
            parameter.grad = torch.randn(parameter.shape)
        with Operations() as operations:
            optimizer.step()
    assert operations.count["_linalg_eigh"] == 2
    assert operations.count["linalg_solve_triangular"] == 1


def test_a_merge_makes_no_temporary_of_a_weights_size():
    width = 512
    operations = rescale(1, hidden_size=width, intermediate_size=width, num_attention_heads=4)
    assert operations.largest < width * width / 2


@pytest.fixture
def meta_model(monkeypatch):
    """A model whose tensors have no values: whatever wants one on the host fails."""
    monkeypatch.setattr("scalora.saving.attach.base_fingerprint", lambda model: "none: there are no weights")
    return with_lora(tiny_llama().to("meta"), r=4, target_modules="all-linear", random_B=False).to("meta")


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["dense", "factored"])
@pytest.mark.parametrize("skipping", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_takes_no_value_from_the_device(meta_model, merge, skipping, dtype):
    for name, parameter in meta_model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    optimizer = torch.optim.AdamW(trainable(meta_model), lr=1e-3, foreach=True)
    config = ScaLoraConfig(warmup_steps=0, merge=merge, remainder_rank=3)
    engine = ScaLora(meta_model, optimizer, config)
    # GradScaler tells fused optimizers, and there are none without a device.
    optimizer.register_step_pre_hook(lambda *_: setattr(optimizer, "found_inf", None))
    tokens = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    operations, columns = Operations(), []
    with operations:
        for _ in range(3):
            # Half precision would be trained under autocast, which there is not on this device.
            if dtype == torch.float32:
                meta_model(input_ids=tokens, labels=tokens).loss.backward()
            else:
                for parameter in trainable(meta_model):
                    parameter.grad = torch.randn_like(parameter)
            if skipping:
                optimizer.found_inf = torch.zeros((), device="meta")
            optimizer.step()
            columns.append(getattr(engine.pairs[0].remainder, "columns", 0))
    assert columns == ([4, 3, 3] if merge == "factored" else [0, 0, 0])  # the second and third were compressed
    assert operations.count.keys() & WAITING == set()
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        engine.metrics()  # what is logged is what has to be fetched


class CopiesToDevice(TorchDispatchMode):
    """Counts copies from the host: for some, CUDA waits until the device has done what is queued on it."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].is_cpu and kwargs.get("device") is not None:
            self.count += torch.device(kwargs["device"]).type != "cpu"
        return func(*args, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "matrix"])
def test_a_step_takes_nothing_from_the_device_and_sends_nothing_there(meta_model, mode):
    if mode == "matrix":
        optimizer = PairAdamW(meta_model, lr=1e-3)
    else:
        optimizer = torch.optim.AdamW(trainable(meta_model), lr=1e-3, foreach=True)
    ScaLora(meta_model, optimizer, ScaLoraConfig(warmup_steps=0, mode=mode))
    for step in range(3):
        for parameter in trainable(meta_model):
            parameter.grad = torch.randn_like(parameter)
        optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)
        with CopiesToDevice() as of_last_step:  # the first one copies constants
            optimizer.step()
    assert of_last_step.count == 0


def calls_for_a_layer(*arguments):
    # In a process of its own: here, shape checks are among the functions.
    script = Path(__file__).with_name("host_calls.py")
    return float(
        subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=True).stdout
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "matrix"])
def test_the_host_is_done_with_a_layer_after_few_calls(mode):
    """A GPU that is ahead of the host waits for them. 78 with torch 2.13 and peft 0.21, AdamW's own included."""
    assert 20 < calls_for_a_layer("step", mode) < 100


@pytest.mark.slow
@pytest.mark.parametrize(("merge", "calls"), [("dense", 12), ("factored", 75)])
def test_a_pass_calls_few_functions_beyond_loras_for_a_layer(merge, calls):
    """9 and 60 with peft 0.21; 39 and 206 while each pass looked through all modules."""
    assert 0 < calls_for_a_layer("pass", merge) <= calls


def test_bfloat16_and_what_is_kept_beside_it_are_the_float32_weight_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    magnitudes = 10.0 ** torch.randint(-30, 30, (64, 96), generator=generator)
    weight = nn.Parameter((torch.randn(64, 96, generator=generator) * magnitudes).bfloat16(), requires_grad=False)
    replay, remainder = weight.float(), DenseRemainder(weight, transposed=False)
    for _ in range(20):
        left, right = torch.randn(64, 4, generator=generator), torch.randn(96, 4, generator=generator)
        remainder.add(weight, left, right)
        replay.addmm_(left, right.mT)
        assert torch.equal(remainder.exact(weight), replay)
        error, nearest = (weight.float() - replay).abs(), (replay.bfloat16().float() - replay).abs()
        assert torch.equal(error, nearest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nothing_to_merge_leaves_any_half_precision_weight_as_it_is(dtype):
    # Every number that the format has, infinities included.
    weight = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(dtype).view(256, 256)
    weight = torch.where(weight.isnan(), 0, weight)
    before, remainder = weight.clone(), DenseRemainder(weight, transposed=False)
    remainder.add(weight, torch.zeros(256, 2), torch.zeros(256, 2))
    assert torch.equal(weight, before)


class FakeEvent:
    """A CUDA event whose times are known, and that says when something waits for it."""

    clock, waited = 0, 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeEvent.clock += 1500
        self.at = FakeEvent.clock

    def synchronize(self):
        FakeEvent.waited += 1

    def elapsed_time(self, stop):
        return stop.at - self.at


def test_the_clock_of_a_run_waits_for_a_device_only_when_it_is_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    clock = StepClock()
    for _ in range(3):
        clock.on_step_begin(None, None, None)
        clock.on_step_end(None, None, None)
    assert FakeEvent.waited == 0
    logs = {}
    clock.on_log(None, None, None, logs=logs)
    assert FakeEvent.waited == 3
    assert (logs["seconds"], clock.per_step) == (4.5, 1.5)
    assert FakeEvent.waited == 3
