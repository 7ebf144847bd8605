"""The adapter and a factored remainder in one pair of matrix products, against two pairs."""

import copy
from collections import Counter

import pytest
import torch
from models import TwoLayers, tiny_llama, trainable, with_lora
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from scalora import ScaLora, ScaLoraConfig
from scalora.rescale.remainder import FactoredRemainder

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}


class Transposed(nn.Module):
    """Two of GPT-2's layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Conv1D(20, 12), Conv1D(6, 20)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def attached(base=None, columns=5, **lora):
    """A model with ScaLoRA attached and something in its factored remainders."""
    torch.manual_seed(0)
    base = TwoLayers() if base is None else base
    model = with_lora(base, **{"r": 3, "target_modules": ["first", "second"]} | lora)
    ScaLora(model, torch.optim.AdamW(trainable(model)), ScaLoraConfig(merge="factored"))
    for module in model.modules():
        if columns and isinstance(module, FactoredRemainder):
            module.append(*(0.3 * torch.randn(len(f), columns).to(f) for f in (module.left, module.right)))
    return model


def inputs(dtype=torch.float32):
    return torch.randn(4, 7, 12, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def results(model, x, run=None):
    """The output, and the gradients of the input and of the adapter."""
    output = (model if run is None else run)(x)
    of = [x, *trainable(model)]
    return [output.detach(), *torch.autograd.grad(output.float().square().sum(), of)]


@pytest.fixture
def in_two_passes(monkeypatch):
    def run(function, *args):
        with monkeypatch.context() as patched:
            patched.setattr("scalora.model.remainder_forward.can_share", lambda *_: False)
            return function(*args)

    return run


def assert_close(found, expected, share):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert other.norm() > 0
        assert (one - other).norm() <= share * other.norm()


def products_in(run):
    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counted[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    counted = Counter()
    with Operations():
        run()
    return sum(counted[name] for name in PRODUCTS)


@pytest.mark.parametrize("columns", [0, 5])
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "rsLoRA", "rescaled", "in eval mode, with dropout"])
def test_one_pass_is_what_two_passes_are(kind, columns, in_two_passes):
    base = Transposed() if kind == "Conv1D" else None
    lora = {"fan_in_fan_out": True} if kind == "Conv1D" else {"use_rslora": kind == "rsLoRA", "lora_dropout": 0.5}
    model = attached(base, columns, **lora)
    if kind == "rescaled":
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", 3)
    model.eval()
    x = inputs()
    assert_close(results(model, x), in_two_passes(results, model, x), 1e-5)


def test_one_pass_has_the_products_of_lora_and_no_more():
    def step(model):
        return lambda: model(inputs()).sum().backward()

    lora = with_lora(TwoLayers(), r=3, target_modules=["first", "second"])
    assert products_in(step(attached())) == products_in(step(lora))


def test_active_dropout_leaves_the_remainder_its_own_input():
    model = attached(lora_dropout=0.5).train()
    layer = model.base_model.model.first
    with torch.no_grad():
        for factor in layer.lora_B["default"].parameters():
            factor.zero_()
    x = inputs()
    expected = layer.base_layer(x) + x @ layer.frozen_remainder.dense().mT
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_rounds_no_more_than_in_two_passes(x_dtype, in_two_passes):
    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    model = attached()
    exact = copy.deepcopy(model).double()
    x = inputs(x_dtype)
    found, two_passes = results(model, x, run), in_two_passes(results, model, x, run)
    true = results(exact, x.detach().double().requires_grad_())
    for one, two, right in zip(found, two_passes, true, strict=True):
        assert one.dtype == two.dtype
        error, error_of_two = ((other.double() - right).norm() / right.norm() for other in (one, two))
        assert 0 < error < 0.02
        assert error < 1.2 * error_of_two


def test_autocast_leaves_the_input_in_its_dtype():
    layer, saved = attached().base_model.model.first, []
    layer.base_layer.bfloat16()
    keeping = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with torch.autocast("cpu", torch.bfloat16), keeping:
        layer(inputs(torch.bfloat16))
    activations = [t for t in saved if t.shape[0] == 4 * 7]
    assert activations
    assert {t.dtype for t in activations} == {torch.bfloat16}


@pytest.mark.parametrize("way", ["checkpointed", "used twice", "vmapped"])
def test_one_pass_under_what_torch_does_with_functions(way, in_two_passes):
    def twice(x):
        return model(x) + 2 * model(x.flip(0))

    model = attached(lora_dropout=0.5).eval()
    ways = {"checkpointed": lambda x: checkpoint(model, x, use_reentrant=False), "vmapped": torch.vmap(model)}
    x = inputs()
    expected = in_two_passes(results, model, x, twice if way == "used twice" else None)
    assert_close(results(model, x, ways.get(way, twice)), expected, 1e-5)


@pytest.mark.parametrize("part", [..., (..., slice(2))])
def test_what_follows_may_change_the_output_in_place(part, in_two_passes):
    def run(x):
        output = model(x)
        output[part].mul_(2)
        return output

    model, x = attached(), inputs()
    assert_close(results(model, x, run), in_two_passes(results, model, x, run), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.usefixtures("without_shape_checks")
def test_one_pass_compiled_is_one_graph_whatever_columns_are_added(autocast):
    model, counter = attached(), CompileCounter()
    x, plain = inputs(), model.base_model.model
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
        assert_close(results(model, x, compiled), results(model, x), 2e-2 if autocast else 1e-5)
        counted = torch.compile(plain, backend=counter, fullgraph=True)
        counted(x)
        plain.first.frozen_remainder.append(torch.randn(16, 3), torch.randn(12, 3))
        torch.testing.assert_close(
            counted(x), model(x), rtol=1e-2 if autocast else 1e-5, atol=0.1 if autocast else 1e-5
        )
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.slow
def test_gradients_of_gradients():
    model = attached(TwoLayers().double(), dtype=torch.float64)
    x, parameters = inputs(torch.float64), trainable(model)
    names = [name for name, p in model.named_parameters() if p.requires_grad]

    def function(x, *values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    small = x.detach()[:1, :2].requires_grad_()
    assert torch.autograd.gradcheck(function, (small, *parameters))
    assert torch.autograd.gradgradcheck(function, (small, *parameters))


def test_gradients_of_each_sample():
    model = attached()
    names = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values, x):
        return torch.func.functional_call(model, values, (x,)).square().sum()

    x = inputs().detach()
    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(names, x)
    for index, sample in enumerate(x):
        for name, gradient in zip(names, results(model, sample.requires_grad_())[2:], strict=True):
            torch.testing.assert_close(found[name][index], gradient, rtol=1e-4, atol=1e-4)


def test_whoever_waits_for_a_call_of_the_factors_gets_it():
    model, seen = attached(), []
    layer = model.base_model.model.first
    expected = layer(inputs())
    layer.lora_A["default"].register_forward_hook(lambda *_: seen.append("hook"))
    torch.testing.assert_close(layer(inputs()), expected)
    assert seen == ["hook"]


def test_a_factor_that_has_changed_since_the_forward_pass_is_an_error():
    model = attached()
    loss = model(inputs()).sum()
    with torch.no_grad():
        model.base_model.model.first.frozen_remainder.left.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_language_model_in_one_pass(in_two_passes):
    model = attached(tiny_llama(), target_modules="all-linear")
    tokens = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))

    def run():
        loss = model(input_ids=tokens, labels=tokens).loss
        return [loss.detach(), *torch.autograd.grad(loss, trainable(model))]

    assert_close(run(), in_two_passes(run), 1e-4)
