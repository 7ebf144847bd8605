"""The controls differ from ScaLoRA in one thing each, and in nothing else."""

import copy
from functools import partial

import pytest
import torch
from models import TwoLayers, trainable, with_lora

from scalora import ScaLora, ScaLoraConfig
from scalora.model.adapters import find_lora_pairs
from scalora.rivals.controls import OracleRestarts, normalising_rule, scale_gradients_only

normalising = partial(ScaLora, scaling_rule=normalising_rule)
forgetting = partial(ScaLora, transport=scale_gradients_only)

TARGETS = {"target_modules": ["first", "second"], "r": 2, "lora_alpha": 4}


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(32, 12, generator=generator).to(dtype), torch.randn(32, 6, generator=generator).to(dtype)


def backward(model):
    x, y = data(next(model.parameters()).dtype)
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss.item()


def factors(model):
    return {
        p.name: (p.lora_B.detach().clone(), p.lora_A.detach().mT.clone(), p.weight.detach().clone())
        for p in find_lora_pairs(model)
    }


def test_normalised_columns_all_have_the_target_norm_and_the_function_stays():
    model = with_lora(TwoLayers(), **TARGETS).double()
    outputs = model(data(torch.float64)[0])
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    engine = normalising(model, optimizer, ScaLoraConfig(warmup_steps=0, target_norm=0.7))
    backward(model)
    optimizer.step()
    for A, B, _ in factors(model).values():
        torch.testing.assert_close(A.norm(dim=0), torch.full((2,), 0.7).double())
        torch.testing.assert_close(B.norm(dim=0), torch.full((2,), 0.7).double())
    torch.testing.assert_close(model(data(torch.float64)[0]), outputs)
    assert engine.metrics()["scalora/column_share"] == 1


def test_normalised_columns_leave_a_zero_start_alone():
    model = with_lora(TwoLayers(), random_B=False, **TARGETS)
    before = factors(model)
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    engine = normalising(model, optimizer, ScaLoraConfig(warmup_steps=0))
    backward(model)
    optimizer.step()
    assert engine.metrics()["scalora/left_alone_share"] == 1
    for name, now in factors(model).items():
        assert all(torch.equal(a, b) for a, b in zip(now, before[name], strict=True))


def test_without_transport_the_moments_are_those_of_before_the_rescale():
    model = with_lora(TwoLayers(), **TARGETS).double()
    moments = {}
    for make_engine in (ScaLora, forgetting):
        this = copy.deepcopy(model)
        optimizer = torch.optim.Adam(trainable(this), lr=1e-3, betas=(0.5, 0.9))
        backward(this)
        optimizer.step()
        optimizer.zero_grad()
        pair = find_lora_pairs(this)[0]
        old, columns = optimizer.state[pair.lora_B]["exp_avg"].clone(), pair.lora_B.detach().norm(dim=0)
        make_engine(this, optimizer, ScaLoraConfig(warmup_steps=0, target_norm=3.0))
        backward(this)
        gradient = pair.lora_B.grad.clone()
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
        alpha = pair.lora_B.detach().norm(dim=0) / columns
        beta = (pair.lora_B.grad / gradient).mean(0)
        assert (alpha - 1).abs().min() > 0.01
        assert (beta - 1).abs().min() > 0.01
        carried = beta if make_engine is ScaLora else 1
        torch.testing.assert_close(optimizer.state[pair.lora_B]["exp_avg"], 0.5 * old * carried + 0.5 * gradient * beta)
        moments[make_engine] = optimizer.state[pair.lora_B]["exp_avg"]
    assert not torch.allclose(moments[ScaLora], moments[forgetting])


def test_a_step_that_the_grad_scaler_skips_does_not_restart():
    model = with_lora(TwoLayers(), **TARGETS)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, fused=True)
    engine = OracleRestarts(model, optimizer, ScaLoraConfig(warmup_steps=0))
    before = factors(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    x, y = data()
    scaler.scale((model(x) - y).square().mean()).backward()
    for pair in find_lora_pairs(model):
        pair.weight.grad.fill_(float("inf"))
        pair.lora_A.grad.fill_(float("inf"))
    scaler.step(optimizer)
    assert engine.state_dict()["rescales"] == 0
    for name, now in factors(model).items():
        assert all(torch.equal(a, b) for a, b in zip(now, before[name], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_restart_takes_the_gradients_singular_vectors_and_forgets_the_moments(dtype):
    model = with_lora(TwoLayers(), **TARGETS).to(dtype)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, weight_decay=0)
    engine = OracleRestarts(model, optimizer, ScaLoraConfig(warmup_steps=1, interval=2, target_norm=0.5))

    def step():
        x, y = data(dtype)
        (model(x) - y).square().mean().backward()
        optimizer.step()

    step()
    optimizer.zero_grad()
    step()
    optimizer.zero_grad()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    x, y = data(dtype)
    outputs = model(x)
    effective = {name: W + 2 * A @ B.mT for name, (A, B, W) in factors(model).items()}
    (outputs - y).square().mean().backward()
    gradients = {p.name: p.weight.grad.clone() for p in find_lora_pairs(model)}
    optimizer.step()
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(model(x), outputs, **tolerance)
    for pair in find_lora_pairs(model):
        A, B, W = factors(model)[pair.name]
        torch.testing.assert_close(W + 2 * A @ B.mT, effective[pair.name], **tolerance)
        U, _, Vh = torch.linalg.svd(gradients[pair.name])
        torch.testing.assert_close((0.5 * U[:, :4:2].mT @ A).abs(), 0.25 * torch.eye(2).to(dtype), **tolerance)
        torch.testing.assert_close((0.5 * Vh[1:4:2] @ B).abs(), 0.25 * torch.eye(2).to(dtype), **tolerance)
        state = optimizer.state[pair.lora_B]
        assert state["step"] == 1
        torch.testing.assert_close(state["exp_avg"], 0.1 * 2 * gradients[pair.name] @ B, **tolerance)
        assert not pair.weight.requires_grad
    engine.detach()


@pytest.mark.slow
def test_every_control_learns():
    for make_engine in (normalising, forgetting, OracleRestarts):
        model = with_lora(TwoLayers(), random_B=False, **TARGETS)
        optimizer = torch.optim.AdamW(trainable(model), lr=2e-2, weight_decay=0)
        make_engine(model, optimizer, ScaLoraConfig(warmup_steps=2, interval=3))
        losses = []
        for _ in range(60):
            losses.append(backward(model))
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < 0.6 * losses[0]
