"""APOLLO: the gradient, with each channel scaled as Adam would scale it in a random low-rank space.

Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", arXiv:2412.05270, algorithm 1. Written from the paper,
because the authors' package, apollo-torch, forbids commercial use (CC BY-NC). It differs in that random projections are
a function of a weight's place in the model and the step alone, so that a run can be resumed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from scalora.integrations.transformers import adamw_arguments
from scalora.rescale.optimizers import loss_of
from scalora.rivals.full_weights import IN_BLOCKS, TrainsBase
from scalora.rivals.method import require_positive
from scalora.rivals.pair_optimizer import adam_direction, step_with_decay

_GROWTH = 1.01
"""γ, by which the norm of an update may grow from one step to the next: the paper's, which takes it from Fira."""


class ApolloOptimizer(Optimizer):
    """APOLLO for some weights, and AdamW for all other parameters.

    Args:
        projected: the weights that APOLLO trains, all of them matrices.
        others: the other parameters.
        rank: r, rank of the space that the moments are kept in.
        update_proj_gap: steps after which the space is drawn anew.
        scale: square of the factor of APOLLO's update.
        lr: learning rate.
        betas: decay rates of the first and second moments.
        eps: term added to the denominator for numerical stability.
        weight_decay: decoupled weight decay, as in AdamW.
    """

    def __init__(
        self,
        projected: Iterable[Tensor],
        others: Iterable[Tensor],
        *,
        rank: int,
        update_proj_gap: int,
        scale: float,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        own = {"params": list(projected), "rank": rank, "update_proj_gap": update_proj_gap, "scale": scale}
        groups: list[dict[str, Any]] = [own, {"params": list(others)}]
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([group for group in groups if group["params"]], defaults)
        self._projections: dict[Tensor, tuple[int, Tensor]] = {}  # with the number of the draw

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: recomputes the loss and the gradients.

        Returns:
            The value of the closure; None without one.
        """
        loss: float | None = loss_of(closure)
        for group in self.param_groups:
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "rank" in group:
                    update = self._scaled_gradient(place, parameter, state, group)
                else:
                    update = adam_direction(parameter.grad, state, group)
                step_with_decay(parameter, update, group)
        return loss

    def _scaled_gradient(self, place: int, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """APOLLO's update of a weight, before the learning rate. The channels are those of the longer side."""
        G = parameter.grad
        assert G is not None
        tall = G.shape[0] >= G.shape[1]
        draw = int(state["step"] if state else 0) // group["update_proj_gap"]
        P = self._projection(place, draw, parameter, min(G.shape), group["rank"])
        R = G @ P.mT if tall else P @ G
        direction = adam_direction(R, state, group)
        channel = 1 if tall else 0
        # A channel without gradient has no factor, and needs none.
        factors = direction.norm(dim=channel, keepdim=True) / R.norm(dim=channel, keepdim=True).clamp_min(1e-8)
        update = G * factors
        norm = update.norm()
        if "norm" in state:
            limited = torch.minimum(norm, _GROWTH * state["norm"])
            # After a step without gradient there is no norm to grow from.
            limited = torch.where(state["norm"] > 0, limited, norm)
            update *= torch.where(norm > 0, limited / norm, 1.0)
            norm = limited
        state["norm"] = norm
        scaled: Tensor = update * math.sqrt(group["scale"])
        return scaled

    def _projection(self, place: int, draw: int, parameter: Tensor, short: int, rank: int) -> Tensor:
        """P, (rank, short), with entries from N(0, 1/rank), which keeps norms on average."""
        known = self._projections.get(parameter)
        if known is None or known[0] != draw:
            generator = torch.Generator().manual_seed(1_000_003 * place + draw)
            P = torch.randn(rank, short, generator=generator) / math.sqrt(rank)
            known = draw, P.to(parameter.device, parameter.dtype)
            self._projections[parameter] = known
        return known[1]


@dataclass(frozen=True)
class Apollo(TrainsBase):
    """APOLLO for the linear layers in the blocks, and AdamW for all other parameters.

    Raises:
        ValueError: an option is not a positive number, or there is no such choice of matrices.
    """

    steps_entries: ClassVar[bool] = False

    rank: int = 8
    """Rank of the space that the moments are kept in. The default is that of LoRA, so that both keep moments of similar
    size."""

    update_proj_gap: int = 200
    """Steps after which the low-rank space is drawn anew. The default is the authors'."""

    scale: float = 64.0
    """Square of the factor of the update, which compensates for the low rank. The authors fine-tune with width/rank;
    the default is that for width 512 and rank 8."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self)

    def optimizer(self, model: nn.Module, arguments: TrainingArguments) -> Optimizer:
        """The optimizer, with the learning rate, betas, epsilon and weight decay of the training arguments.

        Args:
            model: the model to train.
            arguments: the training arguments.

        Raises:
            ValueError: the model has no linear layers in blocks.
        """
        projected = [
            module.weight
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and re.match(IN_BLOCKS, name) and module.weight.requires_grad
        ]
        if not projected:
            raise ValueError("method apollo: the model has no linear layers in numbered blocks to train")
        own = {id(weight) for weight in projected}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        return ApolloOptimizer(
            projected,
            others,
            rank=self.rank,
            update_proj_gap=self.update_proj_gap,
            scale=self.scale,
            **adamw_arguments(arguments),
        )
