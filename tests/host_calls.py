"""Prints how many Python functions are called for each adapted layer.

`host_calls.py step MODE`: in a step with a rescale. `host_calls.py pass MERGE`: in a forward and a backward pass,
beyond those of LoRA.
"""

import sys

import torch
from models import tiny_llama, trainable, with_lora
from torch import nn

from scalora import PairAdamW, ScaLora, ScaLoraConfig
from scalora.model.adapters import find_lora_pairs

LINEAR_LAYERS = 7


def calls_of(function):
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    function()
    sys.setprofile(None)
    return calls


def adapted(blocks):
    model = with_lora(tiny_llama(num_hidden_layers=blocks), r=4, target_modules="all-linear")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def calls_of_a_step(blocks, mode):
    """The calls of the third step of a Llama with so many blocks."""
    model = adapted(blocks)
    if mode == "matrix":
        optimizer = PairAdamW(model, lr=1e-3)
    else:
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, foreach=True)
    ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0, mode=mode))
    for _ in range(3):
        for parameter in trainable(model):
            parameter.grad = torch.randn_like(parameter)
        calls = calls_of(optimizer.step)
    return calls


def calls_of_passes(blocks, merge):
    """The calls of a forward and a backward pass of a Llama with so many blocks, after a rescale."""
    model = adapted(blocks)
    tokens = torch.randint(64, (2, 12))
    if merge is not None:
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
        ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0, merge=merge))
        for parameter in trainable(model):
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        assert all(pair.remainder.changed for pair in find_lora_pairs(model))
    model(input_ids=tokens, labels=tokens).loss.backward()
    return calls_of(lambda: model(input_ids=tokens, labels=tokens).loss.backward())


def for_each_layer(calls, kind):
    few, many = (calls(blocks, kind) for blocks in (2, 5))
    return (many - few) / (3 * LINEAR_LAYERS)


if __name__ == "__main__":
    what, kind = sys.argv[1:]
    if what == "step":
        print(for_each_layer(calls_of_a_step, kind))
    else:
        print(for_each_layer(calls_of_passes, kind) - for_each_layer(calls_of_passes, None))
