"""Controls: ScaLoRA with one thing replaced, to tell what a gain comes from. Not meant for training in earnest.

Two more need no code: scalar scaling only is ``scalora: {mode: scalar}``, a larger scaling of plain LoRA is
``lora: {lora_alpha: …}``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from scalora.config import ScaLoraConfig
from scalora.engine import ScaLora
from scalora.maths.mode import COLUMN, LEFT_ALONE
from scalora.maths.oracle import optimal_adapter
from scalora.maths.scaling import Grams, Scaling, scaling_of_grams
from scalora.rivals.scalora import ScaLoraMethod
from scalora.start import replace_factors, require_weight_gradients


def normalising_rule(grams: Grams, *, target_norm: Float[Tensor, "layers 2"]) -> Scaling:
    """A scaling rule that sets every column's norm to the target norm where ScaLoRA takes the optimum.

    Layers that have no optimum because an input is zero or not finite are left alone, as ScaLoRA does.

    Args:
        grams: of the layers.
        target_norm: ``1/√(Lη)`` of each layer, for A's columns and for B's.
    """
    optimum = scaling_of_grams(grams, target_norm=target_norm)
    usable, (AtA, BtB) = ~optimum.degenerate, grams.of_factors
    norms = target_norm.to(optimum.alpha)

    def to_norm(gram: Tensor, norm: Tensor) -> Tensor:
        squares = gram.diagonal(dim1=-2, dim2=-1)
        return torch.where(usable[:, None], norm[:, None] * squares.rsqrt(), 1.0)

    return optimum._replace(
        alpha=to_norm(AtA, norms[:, 0]),
        beta=to_norm(BtB, norms[:, 1]),
        choice=COLUMN * usable.int(),
        exploding=torch.zeros_like(usable),
    )


def scale_gradients_only(
    optimizer: Optimizer,
    degrees: Mapping[str, int],
    parameters: Sequence[Tensor],
    factors: Sequence[Tensor],
    multiply: Callable[..., None],
) -> None:
    """A transport that scales the gradients by the chain rule and leaves the optimizer's state as it was.

    Args:
        optimizer: is not touched.
        degrees: not used.
        parameters: adapter matrices with gradients.
        factors: one of each parameter's shape.
        multiply: not used.
    """
    for parameter, factor in zip(parameters, factors, strict=True):
        assert parameter.grad is not None
        parameter.grad.mul_(factor)


def leave_alone(grams: Grams, *, target_norm: Float[Tensor, "layers 2"]) -> Scaling:
    """A scaling rule that leaves every layer as it is.

    Args:
        grams: of the layers.
        target_norm: not used.
    """
    optimum = scaling_of_grams(grams, target_norm=target_norm)
    nothing = torch.zeros_like(optimum.degenerate)
    return optimum._replace(
        alpha=torch.ones_like(optimum.alpha),
        beta=torch.ones_like(optimum.beta),
        choice=torch.full_like(optimum.choice, LEFT_ALONE),
        nonfinite=nothing,
        exploding=nothing,
    )


class OracleRestarts(ScaLora):
    """At every rescale starts anew from the oracle (LoRA-GA's start, the paper's Theorem 1), with empty moments.

    An engine that scales nothing, and beside it a hook of its own. The full gradient that the oracle needs is computed
    in the backward pass before: with gradient clipping it counts towards the norm, which the oracle and an optimizer
    without memory don't see.

    Args:
        model: as for `ScaLora`, with base weights that are not quantised.
        optimizer: as for `ScaLora`.
        config: as for `ScaLora`; it restarts where that would rescale.

    Raises:
        UnsupportedLayerError: a quantised base weight, which has no gradient.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, config: ScaLoraConfig | None = None) -> None:
        super().__init__(model, optimizer, config, scaling_rule=leave_alone)
        require_weight_gradients(self.pairs)
        self._watch_weights()
        self._restart_hook = self.optimizer.register_step_pre_hook(self._restart)

    def detach(self) -> None:
        """Stop restarting, and computing the weights' gradients."""
        super().detach()
        self._restart_hook.remove()
        for pair in self.pairs:
            pair.weight.grad = None
            pair.weight.requires_grad_(False)

    @torch.no_grad()
    def _restart(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        skipped = getattr(optimizer, "found_inf", None)
        # A restart waits for the device anyway, and can't be undone by it.
        if self.config.rescales_at(self.step) and not (skipped is not None and skipped.item()):
            for pair in self.pairs:
                G = pair.weight.grad
                if G is None:
                    continue
                G = pair.oriented(G)
                A, B = optimal_adapter(G, pair.r, target_norm=self.target_norms[pair.name][0])
                replace_factors([pair], [(A, B)])
                pair.lora_B.grad = (pair.scaling * G @ B).to(pair.lora_B.dtype)
                pair.lora_A.grad = (pair.scaling * A.mT @ G).to(pair.lora_A.dtype)
                for parameter in (pair.lora_A, pair.lora_B):
                    self.optimizer.state.pop(parameter, None)
        self._watch_weights()

    def _watch_weights(self) -> None:
        """Have the next backward pass compute the weights' gradients, if the step after it restarts."""
        for pair in self.pairs:
            pair.weight.grad = None
            pair.weight.requires_grad_(self.config.rescales_at(self.step + 1))


class NormalisedColumns(ScaLoraMethod):
    """ScaLoRA with `normalising_rule` in place of the analytic optimum."""

    engine: ClassVar[Callable[..., ScaLora]] = staticmethod(partial(ScaLora, scaling_rule=normalising_rule))


class NoTransport(ScaLoraMethod):
    """ScaLoRA whose moments are not carried over: `scale_gradients_only`."""

    engine: ClassVar[Callable[..., ScaLora]] = staticmethod(partial(ScaLora, transport=scale_gradients_only))


class LoraGaRestart(ScaLoraMethod):
    """`OracleRestarts` as a method."""

    cannot_resume: ClassVar[str | None] = (
        "the gradient that its next restart needs is computed a step ahead, and a checkpoint does not hold it"
    )

    engine: ClassVar[Callable[..., ScaLora]] = OracleRestarts
