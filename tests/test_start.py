import pytest
import torch
from models import Mixed, TwoLayers, with_lora

from scalora import ChangedBaseError, optimal_start, oracle_residual, relative_residual
from scalora.start import random_start


def test_the_start_keeps_the_function_and_attains_the_oracle():
    model = with_lora(TwoLayers(), dtype=torch.float64, r=2, target_modules=["first"], lora_alpha=6)
    x, y = torch.randn(20, 12).double(), torch.randn(20, 6).double()
    reference = model(x).detach()
    layer = model.base_model.model.first

    def train_step():
        torch.nn.functional.mse_loss(model(x), y).backward()

    W = (layer.base_layer.weight + layer.get_delta_weight("default")).detach().requires_grad_()
    hidden = torch.tanh(torch.nn.functional.linear(x, W, layer.base_layer.bias))
    loss = torch.nn.functional.mse_loss(model.base_model.model.second(hidden), y)
    (G,) = torch.autograd.grad(loss, W)
    optimal_start(model, train_step)
    torch.testing.assert_close(model(x), reference, rtol=1e-12, atol=1e-12)
    A, B = layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach().T
    torch.testing.assert_close(relative_residual(G, A, B), oracle_residual(G, 2), rtol=1e-9, atol=1e-12)
    assert not layer.base_layer.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ChangedBaseError):
        model.unload()


@pytest.mark.parametrize("merge", ["dense", "factored"])
def test_transposed_layers_keep_the_function_too(merge):
    model = with_lora(Mixed(), dtype=torch.float64, r=2, target_modules=["embed", "conv1d", "linear"])
    tokens = torch.randint(0, 20, (16, 4))
    reference = model(tokens).detach()
    optimal_start(model, lambda: model(tokens).square().mean().backward(), merge=merge)
    torch.testing.assert_close(model(tokens), reference, rtol=1e-12, atol=1e-12)


def test_a_start_that_fails_changes_nothing():
    model = with_lora(TwoLayers(), r=2, target_modules=["first"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"first.*no gradient"):
        optimal_start(model, lambda: None)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("merge", ["dense", "factored"])
def test_a_random_start_has_columns_of_the_norm_and_keeps_the_function(merge):
    model = with_lora(TwoLayers(), dtype=torch.float64, r=3, target_modules=["first", "second"], lora_alpha=6)
    x = torch.randn(20, 12).double()
    reference = model(x).detach()
    random_start(model, target_norm=0.4, merge=merge)
    torch.testing.assert_close(model(x), reference, rtol=1e-12, atol=1e-12)
    for layer in (model.base_model.model.first, model.base_model.model.second):
        A, B = layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach().T
        for factor in (A, B):
            torch.testing.assert_close(factor.norm(dim=0), torch.full((3,), 0.4).double())
