"""Controls: ScaLoRA with one component replaced, to find out where its gain comes from. For experiments only.

Two more controls need no code: scalar scaling alone is ``scalora: {mode: scalar}``, and plain LoRA with a larger
scaling is ``lora: {lora_alpha: …}``.
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
from scalora.model.adapters import find_lora_pairs
from scalora.parallel.processes import averaged, take_from_first
from scalora.rescale.optimizers import Kind
from scalora.rivals.scalora import ScaLoraMethod
from scalora.start import replace_factors, require_weight_gradients


def normalising_rule(grams: Grams, *, target_norm: Float[Tensor, "layers 2"]) -> Scaling:
    """A scaling rule that scales every column to the target norm, where ScaLoRA takes the optimum.

    Layers without an optimum, because an input is zero or not finite, are left alone, as in ScaLoRA.

    Args:
        grams: the Gram matrices of the layers.
        target_norm: ``1/√(Lη)`` of each layer, (layers, 2), for the columns of A and of B.
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
    kinds: Mapping[str, Kind],
    parameters: Sequence[Tensor],
    factors: Sequence[Tensor],
    multiply: Callable[..., None],
) -> None:
    """A transport that scales the gradients by the chain rule and leaves the optimizer's state unchanged.

    Args:
        optimizer: not used.
        kinds: not used.
        parameters: adapter matrices with gradients.
        factors: the factor of each parameter's gradient, of the parameter's shape.
        multiply: not used.
    """
    for parameter, factor in zip(parameters, factors, strict=True):
        assert parameter.grad is not None
        parameter.grad.mul_(factor)


def leave_alone(grams: Grams, *, target_norm: Float[Tensor, "layers 2"]) -> Scaling:
    """A scaling rule that leaves every layer unchanged.

    Args:
        grams: the Gram matrices of the layers.
        target_norm: ``1/√(Lη)`` of each layer, (layers, 2), which has no effect.
    """
    *layers, columns, _ = grams.left.shape
    ones = grams.left.new_ones(*layers, columns // 2)
    nothing = torch.zeros(layers, dtype=torch.bool, device=ones.device)
    choice = torch.full(layers, LEFT_ALONE, dtype=torch.int32, device=ones.device)
    return Scaling(ones, ones, choice, degenerate=nothing, nonfinite=nothing, exploding=nothing)


class OracleRestarts(ScaLora):
    """Instead of every rescale, restarts from the oracle (the paper's Theorem 1, LoRA-GA's start) with empty moments.

    It is an engine that scales nothing, with an additional hook. The full gradients that the oracle needs are computed
    in the backward pass before the restart, and averaged over the processes of a data-parallel run. With gradient
    clipping they count towards the norm, which affects neither the oracle nor Adam's first step with empty moments:
    both are independent of the scale of the gradient.

    Args:
        model: a model with PEFT LoRA layers, exactly one active adapter, and base weights that are not quantised.
        optimizer: the model's optimizer, or a wrapper that holds it in ``.optimizer``, such as Accelerate's.
        config: the settings of ScaLoRA; it restarts at the steps at which ScaLoRA would rescale. None: the defaults.

    Raises:
        UnsupportedLayerError: a base weight is quantised and so has no gradient, or a layer is of a kind that
            `scalora.model.adapters.find_lora_pairs` rejects.
        UnsupportedOptimizerError: it is not known how the optimizer's state scales.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, config: ScaLoraConfig | None = None) -> None:
        require_weight_gradients(find_lora_pairs(model))
        super().__init__(model, optimizer, config, scaling_rule=leave_alone)
        self._watch_weights()
        self._restart_hook = self.optimizer.register_step_pre_hook(self._restart)

    def detach(self) -> None:
        """Remove the hooks: no more restarts, and no more gradients of the base weights."""
        super().detach()
        self._restart_hook.remove()
        for pair in self.pairs:
            pair.weight.grad = None
            pair.weight.requires_grad_(False)

    @torch.no_grad()
    def _restart(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        skipped = getattr(optimizer, "found_inf", None)
        # Unlike a rescale, a restart can't be undone on the device; reading the flag costs nothing, since a restart
        # synchronises with the device anyway.
        if self.config.rescales_at(self.step) and not (skipped is not None and skipped.item()):
            norms = self.target_norms
            gradients = averaged([pair.weight.grad for pair in self.pairs], [pair.weight for pair in self.pairs])
            for pair, stored in zip(self.pairs, gradients, strict=True):
                if stored is None:
                    continue
                G = pair.oriented(stored)
                A, B = (f.contiguous() for f in optimal_adapter(G, pair.r, target_norm=norms[pair.name][0]))
                take_from_first([A, B])
                replace_factors([pair], [(A, B)])
                pair.lora_B.grad = (pair.scaling * G @ B).to(pair.lora_B.dtype)
                pair.lora_A.grad = (pair.scaling * A.mT @ G).to(pair.lora_A.dtype)
                for parameter in (pair.lora_A, pair.lora_B):
                    self.optimizer.state.pop(parameter, None)
        self._watch_weights()

    def _watch_weights(self) -> None:
        """Let the next backward pass compute the gradients of the weights if the step after it restarts."""
        for pair in self.pairs:
            pair.weight.grad = None
            pair.weight.requires_grad_(self.config.rescales_at(self.step + 1))


class NormalisedColumns(ScaLoraMethod):
    """ScaLoRA with columns scaled to the target norm instead of the analytic optimum (`normalising_rule`)."""

    engine: ClassVar[Callable[..., ScaLora]] = staticmethod(partial(ScaLora, scaling_rule=normalising_rule))
    """The engine, with this control's scaling rule."""


class NoTransport(ScaLoraMethod):
    """ScaLoRA with the optimizer's moments left unchanged by a rescale (`scale_gradients_only`)."""

    engine: ClassVar[Callable[..., ScaLora]] = staticmethod(partial(ScaLora, transport=scale_gradients_only))
    """The engine, with this control's transport."""


class LoraGaRestart(ScaLoraMethod):
    """ScaLoRA with restarts from the oracle instead of rescales (`OracleRestarts`)."""

    cannot_resume: ClassVar[str | None] = (
        "the gradient for its next restart is computed one step ahead, and a checkpoint does not contain it"
    )

    engine: ClassVar[Callable[..., ScaLora]] = OracleRestarts
    """The class that attaches the control to a model and its optimizer."""
