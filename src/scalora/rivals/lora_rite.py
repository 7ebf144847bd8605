"""LoRA-RITE (Yen et al., ICLR 2025, arXiv:2410.20625): an optimizer that doesn't see how a product is factored.

(A, B) and (A·T, B·T⁻ᵀ) are the same adapter for every invertible T; under LoRA-RITE they take the same steps. The
paper writes the weight's update as ``Z = A·Bᵀ`` with A (m × r) and B (n × r): PEFT's ``lora_B`` and ``lora_A``
transposed. For one factor, A say, with gradient ∇_A, and its partner B = U_B·R_B with U_B orthonormal:

    ḡ = ∇_A R_B⁻¹                                    the unmagnified gradient, (∂ℓ/∂Z)·U_B
    P = U_B,ₜᵀ U_B,ₜ₋₁                               from the old basis to the new one
    V = β₂·P V Pᵀ + (1 − β₂)·ḡᵀḡ/m                   second moment, r × r
    ρ = β₂·(ρ + d(V, P V Pᵀ))                        the mass that P has lost
    M = β₁·M Pᵀ + (1 − β₁)·ḡ (V + ρI)^(−1/2)         first moment, of the preconditioned gradient
    A ← A − η·M R_B⁻ᵀ

and the same with A and B exchanged. d is the largest fall of an eigenvalue, both spectra sorted. V and ρ are decaying
averages, as in the reference implementation (gkevinyen5418/LoRA-RITE). Which orthonormal basis U_B is does not matter:
the paper takes the polar one, here it is a QR's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from scalora.model.adapters import LoraPair, find_lora_pairs
from scalora.rivals.method import Method, adamw_arguments
from scalora.rivals.pair_optimizer import PairOptimizer, not_in_pairs


class _Factor(NamedTuple):
    """One of a pair's factors at one step.

    Attributes:
        parameter: lora_A or lora_B, which the state is kept for.
        tall: a view of it with its r columns last.
        gradient: the unmagnified gradient, of tall's shape.
        basis: U of the other factor.
        inverse: pseudo-inverse of R of the other factor; zero where the other factor is, as lora_B at PEFT's start.
    """

    parameter: nn.Parameter
    tall: Float[Tensor, "n r"]
    gradient: Float[Tensor, "n r"]
    basis: Float[Tensor, "m r"]
    inverse: Float[Tensor, "r r"]


class LoraRiteOptimizer(PairOptimizer):
    """LoRA-RITE for LoRA pairs and ordinary AdamW for other parameters.

    As in the reference implementation: the β of step t is ``β·(1 − βᵗ⁻¹)/(1 − βᵗ)``, which is Adam's bias correction;
    all unmagnified gradients together are clipped to a norm; with lora_B = 0 the first step moves lora_B only; and
    weight decay is AdamW's, which keeps the invariance. The escaped mass ρ, which the reference leaves out by default,
    is always in, as in the paper's algorithm. The reference also drops an unmagnified gradient whose root mean square
    is above 1; that depends on the loss's scale and is not done here.

    The state of a factor is one moment and one basis of the factors' size besides the r × r: no more than Adam's.

    Args:
        pairs: of one model; a pair whose gradients are None at a step is left alone at that step.
        others: the remaining trainable parameters.
        lr: the learning rate; the weight moves by about ``s·lr`` in each entry of the two bases.
        betas: β₁ and β₂.
        eps: added to the square roots of the eigenvalues of V + ρI; also AdamW's.
        weight_decay: decoupled.
        max_unmagnified_norm: norm of all pairs' unmagnified gradients above which they are scaled down to it. A
            clipping of LoRA's own gradients would depend on the factoring: turn that off.
    """

    def __init__(
        self,
        pairs: Iterable[LoraPair],
        others: Iterable[nn.Parameter] = (),
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        max_unmagnified_norm: float = 1.0,
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
    """Both factors as they are before the step."""
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
    # No eigenvalue rises but by rounding, since P is a contraction.
    fall: Tensor = (torch.linalg.eigvalsh(before) - torch.linalg.eigvalsh(after)).amax()
    return fall.clamp_min(0)


def _inverse_root(second: Float[Tensor, "r r"], escaped_mass: Float[Tensor, ""], eps: float) -> Float[Tensor, "r r"]:
    values, vectors = torch.linalg.eigh(second)
    root = (values.clamp_min(0) + escaped_mass).sqrt()
    inverse_root: Tensor = (vectors / (root + eps)) @ vectors.mT
    return inverse_root


def create_lora_rite_optimizer(
    model: nn.Module,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    max_unmagnified_norm: float = 1.0,
) -> LoraRiteOptimizer:
    """A `LoraRiteOptimizer` for all LoRA pairs of a PEFT model, with AdamW for what else is trainable.

    Raises:
        UnsupportedLayerError: see `scalora.model.adapters.find_lora_pairs`.
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


@dataclass(frozen=True)
class LoraRite(Method):
    """LoRA trained with `LoraRiteOptimizer`.

    Attributes:
        max_unmagnified_norm: see `LoraRiteOptimizer`; infinity never clips.
    """

    max_unmagnified_norm: float = 1.0

    def training_defaults(self) -> dict[str, Any]:
        """No clipping of LoRA's own gradients, which the optimizer's replaces, and the reference's eps."""
        return {"max_grad_norm": 0.0, "adam_epsilon": 1e-6}

    def optimizer(self, model: nn.Module, arguments: TrainingArguments) -> Optimizer:
        """LoRA-RITE with the Trainer's settings for AdamW."""
        return create_lora_rite_optimizer(
            model, **adamw_arguments(arguments), max_unmagnified_norm=self.max_unmagnified_norm
        )
