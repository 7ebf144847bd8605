"""`PairOptimizer`: the common part of optimizers whose steps of ``lora_A`` and ``lora_B`` depend on each other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scalora.model.adapters import LoraPair
from scalora.parallel.sharded_pairs import check_held
from scalora.rescale.optimizers import loss_of


class PairOptimizer(Optimizer):
    """An optimizer with a rule of its own for LoRA pairs, and AdamW for all other parameters.

    A subclass implements `_step_pairs`.

    Args:
        pairs: the LoRA pairs of a model. A pair without gradients is skipped in that step.
        others: the other trainable parameters.
        lr: learning rate.
        betas: decay rates of the first and second moments.
        eps: term added to the denominator for numerical stability.
        weight_decay: decoupled weight decay, as in AdamW.
    """

    def __init__(
        self,
        pairs: Iterable[LoraPair],
        others: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self._pairs = list(pairs)
        self._had_steps = False
        groups = [[factor for pair in self._pairs for factor in (pair.lora_A, pair.lora_B)], list(others)]
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([{"params": group} for group in groups if group], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: recomputes the loss and the gradients.

        Returns:
            The value of the closure; None without one.

        Raises:
            UnsupportedOptimizerError: at the first step: the factors have been replaced by shards or flat tensors.
        """
        loss: float | None = loss_of(closure)
        if not self._had_steps:
            check_held(self, self._pairs)
            self._had_steps = True
        pairs_group, *other_groups = self.param_groups
        self._step_pairs([pair for pair in self._pairs if pair.has_gradients], pairs_group)
        for group in other_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    step_with_decay(parameter, adam_direction(parameter.grad, self.state[parameter], group), group)
        return loss

    @abstractmethod
    def _step_pairs(self, pairs: list[LoraPair], group: dict[str, Any]) -> None:
        """Update the factors of the pairs, all of which have gradients.

        Args:
            pairs: the LoRA pairs.
            group: their parameter group, with ``lr``, ``betas``, ``eps`` and ``weight_decay``.
        """


def not_in_pairs(model: nn.Module, pairs: Iterable[LoraPair]) -> list[nn.Parameter]:
    """The trainable parameters of a model that belong to no LoRA pair.

    Args:
        model: the model.
        pairs: its LoRA pairs.
    """
    paired = {id(factor) for pair in pairs for factor in (pair.lora_A, pair.lora_B)}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in paired]


def step_with_decay(parameter: Tensor, direction: Tensor, group: dict[str, Any]) -> None:
    """Step against a direction, with decoupled weight decay as in AdamW.

    Args:
        parameter: the parameter; modified.
        direction: the direction, of the parameter's shape.
        group: parameter group with ``lr`` and ``weight_decay``.
    """
    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])


def adam_direction(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Update Adam's moments and compute its direction ``m̂ / (√v̂ + eps)``.

    Args:
        gradient: the gradient, of any shape.
        state: the moments and the step count, under the names that torch uses; updated in place, empty before the first
            step.
        group: parameter group with ``betas`` and ``eps``.

    Returns:
        The direction, of the gradient's shape, which is to be multiplied by the learning rate.
    """
    if not state:
        state["step"] = torch.zeros(())
        state["exp_avg"] = torch.zeros_like(gradient)
        state["exp_avg_sq"] = torch.zeros_like(gradient)
    beta1, beta2 = group["betas"]
    state["step"] += 1
    step = state["step"].item()
    state["exp_avg"].lerp_(gradient, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
    direction: Tensor = state["exp_avg"] / (1 - beta1**step) / denominator
    return direction
