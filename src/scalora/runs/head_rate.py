"""A learning rate of its own for the new head of a classification or regression model.

A head starts at random and has further to go than pretrained weights. At the rates that suit those it can be what
limits a run, whichever method trains the rest.
"""

from __future__ import annotations

from typing import Any

from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer

from scalora.pair_adamw import PairAdamW

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


class RatedHead(Trainer):  # type: ignore[misc]
    """A trainer whose model's head has a learning rate of its own.

    Args:
        *args: as for the trainer that it is mixed into.
        head_rate: learning rate of the new head. None: that of everything else; with `scalora.PairAdamW`, ten times it.
        **kwargs: as for the trainer that it is mixed into.
    """

    def __init__(self, *args: Any, head_rate: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_rate = head_rate

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """As Transformers does, with the head's learning rate.

        Args:
            *args: arguments of `transformers.Trainer.create_optimizer`.
            **kwargs: the same by name.
        """
        optimizer: Optimizer = super().create_optimizer(*args, **kwargs)
        rate = self._head_rate
        if rate is None and isinstance(optimizer, PairAdamW):
            rate = HEAD_FACTOR * self.args.learning_rate
        if rate is not None:
            give_rate(optimizer, head_parameters(self.model), rate)
        return optimizer
