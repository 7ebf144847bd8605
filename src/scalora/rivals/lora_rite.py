"""LoRA-RITE: an optimizer for LoRA that is invariant to how the product of the factors is factored.

Yen et al., "LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA Optimization", ICLR 2025,
arXiv:2410.20625. (A, B) and (A·T, B·T⁻ᵀ) are the same adapter for every invertible T, and LoRA-RITE takes the same
steps from both. The paper writes the adapter as ``Z = A·Bᵀ`` with A (m × r), PEFT's ``lora_B``, and B (n × r), PEFT's
``lora_A`` transposed. For one factor, say A, with gradient ∇_A, and the other factor B = U_B·R_B with orthonormal U_B:

    ḡ = ∇_A R_B⁻¹                                    the unmagnified gradient, (∂ℓ/∂Z)·U_B
    P = U_B,ₜᵀ U_B,ₜ₋₁                               from the old basis to the new one
    V = β₂·P V Pᵀ + (1 − β₂)·ḡᵀḡ/m                   second moment, r × r
    ρ = β₂·(ρ + d(V, P V Pᵀ))                        escaped mass, which P has lost
    M = β₁·M Pᵀ + (1 − β₁)·ḡ (V + ρI)^(−1/2)         first moment, of the preconditioned gradient
    A ← A − η·M R_B⁻ᵀ

and the same with A and B exchanged. d is the largest decrease of an eigenvalue, with both spectra sorted. V and ρ are
decaying averages, as in the authors' code (gkevinyen5418/LoRA-RITE). Any orthonormal basis U_B gives the same steps;
the paper uses that of the polar decomposition, this module that of QR.

As in the authors' code, β at step t is ``β·(1 − βᵗ⁻¹)/(1 − βᵗ)``, which is Adam's bias correction; the unmagnified
gradients of all pairs are clipped together; with ``lora_B`` = 0 the first step moves ``lora_B`` only; and weight decay
is that of AdamW, which preserves the invariance. Two things differ: the escaped mass ρ, which their code leaves out by
default, is always included, as in the paper's algorithm; and unmagnified gradients with a root mean square above 1,
which their code sets to zero, are used, because that criterion depends on the scale of the loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from scalora.config import DEFAULT_LEARNING_RATE
from scalora.integrations.transformers import adamw_arguments
from scalora.model.adapters import LoraPair, find_lora_pairs
from scalora.rivals.method import Method
from scalora.rivals.pair_optimizer import PairOptimizer, not_in_pairs

_EPS = 1e-6  # as in the authors' code


class _Factor(NamedTuple):
    """One factor of a pair in one step.

    Attributes:
        parameter: ``lora_A`` or ``lora_B``, the key of the optimizer state.
        tall: a view of the parameter with r columns.
        gradient: the unmagnified gradient, of the shape of `tall`.
        basis: U of the other factor.
        inverse: pseudo-inverse of R of the other factor; zero if that factor is zero, as ``lora_B`` initially.
    """

    parameter: nn.Parameter
    tall: Float[Tensor, "n r"]
    gradient: Float[Tensor, "n r"]
    basis: Float[Tensor, "m r"]
    inverse: Float[Tensor, "r r"]


class LoraRiteOptimizer(PairOptimizer):
    """LoRA-RITE for LoRA pairs, and AdamW for all other parameters.

    The state of a factor is a moment and a basis of the size of the two factors, and an r × r matrix: about as much as
    that of Adam.

    Args:
        pairs: the LoRA pairs of a model. A pair without gradients is skipped in that step.
        others: the other trainable parameters.
        lr: learning rate; the weight moves by about ``s·lr`` in each entry of the two bases.
        betas: β₁ and β₂, the decay rates of the moments.
        eps: term added to the square roots of the eigenvalues of V + ρI, and to AdamW's denominator.
        weight_decay: decoupled weight decay, as in AdamW.
        max_unmagnified_norm: maximum norm of the unmagnified gradients of all pairs together, to which larger ones are
            scaled down. Turn off the clipping of LoRA's own gradients, which depends on the factoring.
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
        max_unmagnified_norm: float,
    ) -> None:
        super().__init__(pairs, others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self._max_unmagnified_norm = max_unmagnified_norm

    def _step_pairs(self, pairs: list[LoraPair], group: dict[str, Any]) -> None:
        factors = [factor for pair in pairs for factor in _factors(pair)]
        if not factors:
            return
        norm = torch.stack([factor.gradient.norm() for factor in factors]).norm()
        clipping = (self._max_unmagnified_norm / norm).clamp_max(1)
        for factor in factors:
            self._step_factor(factor, factor.gradient * clipping, group)

    def _step_factor(self, factor: _Factor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[factor.parameter]
        if not state:
            rank = gradient.shape[1]
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(gradient)
            state["exp_avg_sq"] = gradient.new_zeros(rank, rank)
            state["escaped_mass"] = gradient.new_zeros(())
            state["basis"] = torch.zeros_like(factor.basis)
        state["step"] += 1
        step = state["step"].item()
        new_in_first, new_in_second = ((1 - beta) / (1 - beta**step) for beta in group["betas"])

        projection = factor.basis.mT @ state["basis"]
        carried = projection @ state["exp_avg_sq"] @ projection.mT
        escaped_mass = (1 - new_in_second) * (state["escaped_mass"] + _escaped_mass(state["exp_avg_sq"], carried))
        second = carried.lerp(gradient.mT @ gradient / gradient.shape[0], new_in_second)
        preconditioned = gradient @ _inverse_root(second, escaped_mass, group["eps"])
        first = (state["exp_avg"] @ projection.mT).lerp(preconditioned, new_in_first)
        state.update(exp_avg=first, exp_avg_sq=second, escaped_mass=escaped_mass, basis=factor.basis)

        factor.tall.mul_(1 - group["lr"] * group["weight_decay"]).sub_(first @ factor.inverse.mT, alpha=group["lr"])


def _factors(pair: LoraPair) -> list[_Factor]:
    """Both factors of a pair, before the step."""
    assert pair.lora_A.grad is not None
    assert pair.lora_B.grad is not None
    tall_A, tall_B = pair.lora_A.mT, pair.lora_B
    basis_A, R_A = torch.linalg.qr(tall_A)
    basis_B, R_B = torch.linalg.qr(tall_B)
    inverse_A, inverse_B = torch.linalg.pinv(R_A), torch.linalg.pinv(R_B)
    return [
        _Factor(pair.lora_A, tall_A, pair.lora_A.grad.mT @ inverse_B, basis_B, inverse_B),
        _Factor(pair.lora_B, tall_B, pair.lora_B.grad @ inverse_A, basis_A, inverse_A),
    ]


def _escaped_mass(before: Float[Tensor, "r r"], after: Float[Tensor, "r r"]) -> Float[Tensor, ""]:
    # P is a contraction, so that eigenvalues increase by rounding errors only.
    fall: Tensor = (torch.linalg.eigvalsh(before) - torch.linalg.eigvalsh(after)).amax()
    return fall.clamp_min(0)


def _inverse_root(second: Float[Tensor, "r r"], escaped_mass: Float[Tensor, ""], eps: float) -> Float[Tensor, "r r"]:
    values, vectors = torch.linalg.eigh(second)
    root = (values.clamp_min(0) + escaped_mass).sqrt()
    inverse_root: Tensor = (vectors / (root + eps)) @ vectors.mT
    return inverse_root


@dataclass(frozen=True)
class LoraRite(Method):
    """LoRA-RITE: LoRA trained by `LoraRiteOptimizer`."""

    steps_entries: ClassVar[bool] = False

    max_unmagnified_norm: float = 1.0
    """Maximum norm of the unmagnified gradients of all pairs together, in place of the Trainer's ``max_grad_norm``;
    infinity for no clipping. The default is that of the authors' code."""

    def training_defaults(self) -> dict[str, Any]:
        """No clipping of LoRA's own gradients, in place of which the optimizer clips, and the authors' epsilon."""
        return {"max_grad_norm": 0.0, "adam_epsilon": _EPS}

    def optimizer(self, model: nn.Module, arguments: TrainingArguments) -> Optimizer:
        """The LoRA-RITE optimizer.

        Args:
            model: the model to train, with LoRA layers.
            arguments: the training arguments, with the settings of AdamW.

        Raises:
            UnsupportedLayerError: a layer that `scalora.model.adapters.find_lora_pairs` rejects.
        """
        return create_lora_rite_optimizer(
            model, **adamw_arguments(arguments), max_unmagnified_norm=self.max_unmagnified_norm
        )


def create_lora_rite_optimizer(
    model: nn.Module,
    *,
    lr: float = DEFAULT_LEARNING_RATE,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = _EPS,
    weight_decay: float = 0.0,
    max_unmagnified_norm: float = LoraRite.max_unmagnified_norm,
) -> LoraRiteOptimizer:
    """Create a `LoraRiteOptimizer` for a PEFT model, with AdamW for the parameters outside its LoRA pairs.

    Args:
        model: a model with PEFT LoRA layers and exactly one active adapter.
        lr: learning rate; the weight moves by about ``s·lr`` in each entry of the two bases.
        betas: decay rates of the moments. The default is AdamW's.
        eps: term added to the square roots of the eigenvalues of V + ρI, and to AdamW's denominator.
        weight_decay: decoupled weight decay.
        max_unmagnified_norm: maximum norm of the unmagnified gradients of all pairs together. Turn off the clipping of
            LoRA's own gradients, which depends on the factoring.

    Raises:
        UnsupportedLayerError: a layer that `scalora.model.adapters.find_lora_pairs` rejects.
    """
    pairs = find_lora_pairs(model)
    return LoraRiteOptimizer(
        pairs,
        not_in_pairs(model, pairs),
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        max_unmagnified_norm=max_unmagnified_norm,
    )
