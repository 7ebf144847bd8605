"""Controls: ScaLoRA with one thing replaced, to tell what a gain comes from. Not meant for training in earnest.

Two more need no code: scalar scaling only is ``scalora: {mode: scalar}``, a larger scaling of plain LoRA is
``lora: {lora_alpha: …}``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scalora.adapters import LoraPair
from scalora.config import ScaLoraConfig
from scalora.engine import ScaLora
from scalora.rivals.scalora import ScaLoraMethod
from scalora.scaling import COLUMN, Grams, Scaling, optimal_adapter, scaling_of_grams
from scalora.start import replace_factors, require_weight_gradients


class NormalisingScaLora(ScaLora):
    """Sets every column's norm to ``1/√(Lη)`` where ScaLoRA takes the optimum; everything else alike.

    Layers that have no optimum because an input is zero or not finite are left alone, as ScaLoRA does.
    """

    def _scaling(self, grams: Grams, target_norms: Tensor) -> Scaling:
        optimum = scaling_of_grams(grams, target_norm=target_norms)
        usable, (AtA, BtB) = ~optimum.degenerate, grams.of_factors
        norms = target_norms.to(optimum.alpha)

        def to_norm(gram: Tensor, norm: Tensor) -> Tensor:
            squares = gram.diagonal(dim1=-2, dim2=-1)
            return torch.where(usable[:, None], norm[:, None] * squares.rsqrt(), 1.0)

        return optimum._replace(
            alpha=to_norm(AtA, norms[:, 0]),
            beta=to_norm(BtB, norms[:, 1]),
            choice=COLUMN * usable.int(),
            exploding=torch.zeros_like(usable),
        )


class ForgettingScaLora(ScaLora):
    """Scales the gradient by the chain rule but leaves the optimizer's state as it was: no transport."""

    def _carry_over(self, parameters: list[Tensor], factors: list[Tensor]) -> None:
        for parameter, factor in zip(parameters, factors, strict=True):
            assert parameter.grad is not None
            parameter.grad.mul_(factor)


class RestartingScaLora(ScaLora):
    """At every rescale starts anew from the oracle (LoRA-GA's start, the paper's Theorem 1), with empty moments.

    The full gradient that the oracle needs is computed in the backward pass before: with gradient clipping it counts
    towards the norm, which the oracle and an optimizer without memory don't see.

    Raises:
        UnsupportedLayerError: a quantised base weight, which has no gradient.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, config: ScaLoraConfig | None = None) -> None:
        super().__init__(model, optimizer, config)
        require_weight_gradients(self._pairs)
        self._watch_weights()

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._before_step(optimizer, args, kwargs)
        self._watch_weights()

    def _watch_weights(self) -> None:
        """Have the next backward pass compute the weights' gradients, if the step after it restarts."""
        for pair in self._pairs:
            pair.weight.grad = None
            pair.weight.requires_grad_(self._rescales_at(self._progress.step + 1))

    def _rescale_group(self, shapes: list[list[LoraPair]], skipped: Tensor | None) -> None:
        if skipped is not None and skipped.item():  # a restart waits for the device anyway, and can't be undone by it
            return
        for pair in (pair for pairs in shapes for pair in pairs):
            G = pair.weight.grad
            if G is None:
                continue
            if pair.transposed:
                G = G.mT
            A, B = optimal_adapter(G, pair.lora_A.shape[0], target_norm=self._target_norms[pair.name][0])
            replace_factors([pair], [(A, B)])
            pair.lora_B.grad = (pair.scaling * G @ B).to(pair.lora_B.dtype)
            pair.lora_A.grad = (pair.scaling * A.mT @ G).to(pair.lora_A.dtype)
            for parameter in (pair.lora_A, pair.lora_B):
                self._optimizer.state.pop(parameter, None)

    def detach(self) -> None:
        """Stop restarting, and computing the weights' gradients."""
        super().detach()
        for pair in self._pairs:
            pair.weight.grad = None
            pair.weight.requires_grad_(False)


class NormalisedColumns(ScaLoraMethod):
    """`NormalisingScaLora` as a method."""

    engine: ClassVar[type[ScaLora]] = NormalisingScaLora


class NoTransport(ScaLoraMethod):
    """`ForgettingScaLora` as a method."""

    engine: ClassVar[type[ScaLora]] = ForgettingScaLora


class LoraGaRestart(ScaLoraMethod):
    """`RestartingScaLora` as a method."""

    cannot_resume: ClassVar[str | None] = (
        "the gradient that its next restart needs is computed a step ahead, and a checkpoint does not hold it"
    )

    engine: ClassVar[type[ScaLora]] = RestartingScaLora
