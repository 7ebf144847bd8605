"""Prints how many Python functions a step with a rescale calls for each adapted layer: `host_calls.py MODE`."""

import sys

import torch
from models import tiny_llama, trainable, with_lora

from scalora import PairAdamW, ScaLora, ScaLoraConfig

LINEAR_LAYERS = 7


def calls_of_a_step(blocks, mode):
    """The calls of the third step of a Llama with so many blocks."""
    model = with_lora(tiny_llama(num_hidden_layers=blocks), r=4, target_modules="all-linear")
    if mode == "matrix":
        optimizer = PairAdamW(model, lr=1e-3)
    else:
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, foreach=True)
    ScaLora(model, optimizer, ScaLoraConfig(warmup_steps=0, mode=mode))
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    for _ in range(3):
        for parameter in trainable(model):
            parameter.grad = torch.randn_like(parameter)
        calls = 0
        sys.setprofile(count)
        optimizer.step()
        sys.setprofile(None)
    return calls


if __name__ == "__main__":
    few, many = (calls_of_a_step(blocks, sys.argv[1]) for blocks in (2, 5))
    print((many - few) / (3 * LINEAR_LAYERS))
