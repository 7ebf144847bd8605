"""Mixtures of experts whose experts are one parameter (`target_parameters`): each expert is a LoRA pair of its own.

The truth is the same model with each expert a linear layer and ordinary LoRA, on the same tokens.
"""

import pytest
import torch
from experts import (
    ADAPTER,
    EXPERTS,
    MODELS,
    backward,
    batch,
    factors_of_experts,
    fused,
    path_of_expert,
    separate,
    tiny,
    weights_of_experts,
)
from models import trainable, with_lora
from peft.tuners.lora.layer import ParamWrapper

from scalora import PairAdamW, ScaLora, ScaLoraConfig

STEPS = 6

CASES = {
    "auto": {},
    "column": {"mode": "column"},
    "scalar, sgd": {"mode": "scalar", "optimizer": "sgd"},
    "matrix, sgd": {"mode": "matrix", "optimizer": "sgd", "target_norm": 1.0},
    "matrix, pairs": {"mode": "matrix", "optimizer": "pairs"},
    "matrix, pairs that decay": {"mode": "matrix", "optimizer": "decaying pairs", "merge": "factored"},
    "columns, pairs": {"optimizer": "pairs", "target_norm": 1.0},
    "factored": {"merge": "factored", "remainder_rank": 12},
    "compressed": {"merge": "factored", "remainder_rank": 2},
    "interval": {"interval": 3},
}

OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(trainable(model), lr=2e-2),
    "sgd": lambda model: torch.optim.SGD(trainable(model), lr=2e-2, momentum=0.9),
    "pairs": lambda model: PairAdamW(model, lr=2e-3),
    "decaying pairs": lambda model: PairAdamW(model, lr=2e-3, weight_decay=1.0),
}


def attached(model, optimizer="adamw", **config):
    config = {"warmup_steps": 0, "merge": "dense"} | config
    optimizer = OPTIMIZERS[optimizer](model)
    return ScaLora(model, optimizer, ScaLoraConfig(**config)), optimizer


def train(model, optimizer, steps=STEPS, **shape):
    """Steps on the same tokens for all models; returns the losses."""
    losses = []
    for step in range(steps):
        losses.append(backward(model, step, **shape))
        for parameter in trainable(model):  # experts that are linear layers have no gradient without tokens
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        optimizer.step()
    return losses


def fused_layers(model):
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, ParamWrapper)}


def updates(model):
    """The whole update of each expert in a model with linear experts, and of the other layers."""
    return {
        path: layer.get_delta_weight("default") for path, layer in model.named_modules() if hasattr(layer, "lora_A")
    }


def check_equal_trajectories(name, tolerance=1e-10, **case):
    whole = fused(name)
    parts = separate(name, whole)
    engine, optimizer = attached(whole, **case)
    other, optimizer_of_parts = attached(parts, **case)
    before = [loss for loss in train(whole, optimizer)]
    assert before == pytest.approx(train(parts, optimizer_of_parts), rel=tolerance)
    layers, norm = dict(parts.named_modules()), 0.0
    for path, layer in fused_layers(whole).items():
        for expert, (A, B) in enumerate(factors_of_experts(layer)):
            own = layers[path_of_expert(path, layer, expert)]
            close(A, own.lora_A["default"].weight, tolerance)
            close(B, own.lora_B["default"].weight, tolerance)
            close(weights_of_experts(layer)[expert], own.get_base_layer().weight, tolerance)
            if case.get("merge") == "factored":
                update = layer.get_delta_weight("default")[expert]
                close(update.mT if name == "gpt_oss" else update, own.get_delta_weight("default"), tolerance)
    found, wanted = engine.metrics(), other.metrics()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-7, abs=1e-9), key
    return engine, other


def close(found, wanted, tolerance):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_fused_experts_train_as_separate_ones_do(name):
    check_equal_trajectories(name)


@pytest.mark.parametrize("case", CASES)
def test_fused_experts_train_as_separate_ones_do_in_all_modes(case):
    # A compression's square roots of Gram matrices resolve 1e-8 of what it compresses.
    check_equal_trajectories("mixtral", 1e-7 if case == "compressed" else 1e-10, **CASES[case])
