"""A learning rate of its own for the new head of a classification or regression model.

A head starts at random and has further to go than pretrained weights. At the rates that suit those it can be what
limits a run, whichever method trains the rest.
"""

from __future__ import annotations

from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from torch.optim import Optimizer

HEAD_FACTOR = 10
"""The head's rate with `scalora.PairAdamW`, in units of its learning rate: LoRA's rates, at which people train heads
with it, are about ten times those of full fine-tuning, which are PairAdamW's."""


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters of a model's head, by the names that PEFT knows heads by.

    Args:
        model: a model for classification or regression, with or without an adapter.
    """
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not set(SEQ_CLS_HEAD_NAMES).isdisjoint(name.split("."))
    ]


def give_rate(optimizer: Optimizer, parameters: list[nn.Parameter], learning_rate: float) -> None:
    """Move parameters of a new optimizer into groups with a learning rate of their own.

    Args:
        optimizer: the optimizer, before its first step and before a scheduler has been made for it.
        parameters: some of its parameters.
        learning_rate: their learning rate.
    """
    chosen = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in chosen]
        if not moved:
            continue
        group["params"] = [p for p in group["params"] if id(p) not in chosen]
        if group["params"]:
            optimizer.add_param_group({**group, "params": moved, "lr": learning_rate})
        else:
            group.update(params=moved, lr=learning_rate)
