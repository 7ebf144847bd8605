"""LoRA-Pro (Wang et al., ICLR 2025, arXiv:2407.18242): factor updates whose effect on the weight is nearest a full one.

The paper's names are PEFT's: ``W = W₀ + s·B·A`` with A (r × n) = ``lora_A``, B (m × r) = ``lora_B``, s the scaling, and
``g = ∂ℓ/∂W`` (m × n), which LoRA shows only as ``g_A = s·Bᵀg`` and ``g_B = s·g·Aᵀ``. Moving the factors by (d_A, d_B)
moves the weight by the *equivalent gradient* ``s·(B·d_A + d_B·A)``. It is nearest g in Frobenius norm for

    d_A = (BᵀB)⁻¹ g_A / s² + X·A,      d_B = (I − B(BᵀB)⁻¹Bᵀ) g_B (AAᵀ)⁻¹ / s² − B·X

with any X (r × r), which cancels in the equivalent gradient. Among these, (d_A, d_B) is nearest (g_A, g_B) for the
solution of the Sylvester equation ``BᵀB·X + X·AAᵀ = −(BᵀB)⁻¹ g_A Aᵀ / s²``.
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

from scalora.maths.scaling import solver_dtype
from scalora.model.adapters import LoraPair, find_lora_pairs
from scalora.rivals.method import Method, adamw_arguments
from scalora.rivals.pair_optimizer import PairOptimizer, adam_direction, not_in_pairs

# The reference implementation's damping of both Gram matrices. It decides the second step from lora_B = 0, when
# BᵀB is of the order of the learning rate squared.
_DAMPING = 1e-8


class _Grams(NamedTuple):
    """Eigenvalues, ascending and not negative, and eigenvectors of ``AAᵀ`` and ``BᵀB``."""

    values_A: Float[Tensor, " r"]
    vectors_A: Float[Tensor, "r r"]
    values_B: Float[Tensor, " r"]
    vectors_B: Float[Tensor, "r r"]


def equivalent_gradient(
    lora_A: Float[Tensor, "r n"],
    lora_B: Float[Tensor, "m r"],
    grad_A: Float[Tensor, "r n"],
    grad_B: Float[Tensor, "m r"],
    scaling: float,
) -> Float[Tensor, "m n"]:
    """The full gradient as far as the factors can follow it, ``g − (I − P_B)·g·(I − P_A)``.

    P_A and P_B are the projections onto the row space of lora_A and the column space of lora_B. LoRA's own gradients
    are enough to know it.

    Args:
        lora_A: (r, n).
        lora_B: (m, r); zeros are allowed, as at PEFT's start.
        grad_A: ``s·Bᵀg``, (r, n).
        grad_B: ``s·g·Aᵀ``, (m, r).
        scaling: s, not zero.

    Returns:
        (m, n) in lora_A's dtype; the inverses are computed in float64 where the device has it.
    """
    A, B, grad_A, grad_B = _in_solver_dtype(lora_A, lora_B, grad_A, grad_B)
    direction_A, direction_B = _directions_without_X(A, B, grad_A, grad_B, scaling, _grams(A, B))
    return scaling * (lora_B @ direction_A.to(lora_A.dtype) + direction_B.to(lora_A.dtype) @ lora_A)


def adjusted_gradients(
    lora_A: Float[Tensor, "r n"],
    lora_B: Float[Tensor, "m r"],
    grad_A: Float[Tensor, "r n"],
    grad_B: Float[Tensor, "m r"],
    scaling: float,
) -> tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]]:
    """The pair (d_A, d_B) with the best equivalent gradient that is nearest LoRA's own gradients.

    Arguments as for `equivalent_gradient`; returns the adjusted gradients of lora_A, (r, n), and lora_B, (m, r).
    """
    A, B, grad_A, grad_B = _in_solver_dtype(lora_A, lora_B, grad_A, grad_B)
    grams = _grams(A, B)
    direction_A, direction_B = _directions_without_X(A, B, grad_A, grad_B, scaling, grams)
    X = _solve_sylvester(grams, -direction_A @ A.mT)
    return (direction_A + X @ A).to(lora_A.dtype), (direction_B - B @ X).to(lora_B.dtype)


def _in_solver_dtype(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(solver_dtype(tensor.device)) for tensor in tensors]


def _grams(A: Tensor, B: Tensor) -> _Grams:
    values_A, vectors_A = torch.linalg.eigh(A @ A.mT)
    values_B, vectors_B = torch.linalg.eigh(B.mT @ B)
    return _Grams(values_A.clamp_min(0), vectors_A, values_B.clamp_min(0), vectors_B)


def _directions_without_X(
    A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, scaling: float, grams: _Grams
) -> tuple[Tensor, Tensor]:
    inverse_A = (grams.vectors_A / (grams.values_A + _DAMPING)) @ grams.vectors_A.mT
    inverse_B = (grams.vectors_B / (grams.values_B + _DAMPING)) @ grams.vectors_B.mT
    outside_B = grad_B - B @ (inverse_B @ (B.mT @ grad_B))
    return inverse_B @ grad_A / scaling**2, outside_B @ inverse_A / scaling**2


def _solve_sylvester(grams: _Grams, rhs: Tensor) -> Tensor:
    """X with ``BᵀB·X + X·AAᵀ = rhs``: diagonal in the two eigenbases, because both Gram matrices are symmetric."""
    sums = grams.values_B[:, None] + grams.values_A[None, :]
    # A sum of zero comes with a right-hand side of zero.
    solution = (grams.vectors_B.mT @ rhs @ grams.vectors_A) / sums.clamp_min(torch.finfo(sums.dtype).tiny)
    return grams.vectors_B @ solution @ grams.vectors_A.mT


class LoraProOptimizer(PairOptimizer):
    """The paper's AdamW version (Algorithm 2): Adam on the equivalent gradient, then back to the factors.

    At each step and for each pair: the equivalent gradient from LoRA's gradients; Adam's moments of it and its
    direction D, as full fine-tuning's AdamW would have them; ``s·BᵀD`` and ``s·D·Aᵀ`` in place of LoRA's gradients,
    adjusted; a step of them. So the weight follows full fine-tuning's Adam step as far as the factors
    can, and learning rates are full fine-tuning's.

    **Memory.** The two moments of a pair are (m, n) each, in the adapter's dtype: 8·m·n bytes a layer in float32, as
    much as AdamW keeps in full fine-tuning, against 8·r·(m + n) for LoRA's. Adapting the linear layers of a model with
    7 billion weights takes some 50 GB.

    Weight decay shrinks lora_A and lora_B each by ``1 − lr·weight_decay``, as AdamW does. (The reference's version
    with full moments shrinks the frozen weight too, after which the adapter would be wrong on the original base.)
    With lora_B = 0 the first step moves lora_B only, as in the reference.

    Args:
        pairs: of one model; a pair whose gradients are None at a step is left alone at that step.
        others: the remaining trainable parameters, which get ordinary AdamW.
        lr: the learning rate, of the weight's movement.
        betas: Adam's.
        eps: Adam's.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        pairs: Iterable[LoraPair],
        others: Iterable[nn.Parameter] = (),
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(pairs, others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def _step_pairs(self, pairs: list[LoraPair], group: dict[str, Any]) -> None:
        for pair in pairs:
            assert pair.lora_A.grad is not None
            assert pair.lora_B.grad is not None
            self._step_pair(pair, pair.lora_A.grad, pair.lora_B.grad, group)

    def _step_pair(self, pair: LoraPair, grad_A: Tensor, grad_B: Tensor, group: dict[str, Any]) -> None:
        A, B, s = pair.lora_A, pair.lora_B, pair.scaling
        direction = adam_direction(equivalent_gradient(A, B, grad_A, grad_B, s), self.state[A], group)
        adjusted_A, adjusted_B = adjusted_gradients(A, B, s * B.mT @ direction, s * direction @ A.mT, s)
        shrinkage = 1 - group["lr"] * group["weight_decay"]
        A.mul_(shrinkage).sub_(adjusted_A, alpha=group["lr"])
        B.mul_(shrinkage).sub_(adjusted_B, alpha=group["lr"])


def create_lora_pro_optimizer(
    model: nn.Module,
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> LoraProOptimizer:
    """A `LoraProOptimizer` for all LoRA pairs of a PEFT model, with AdamW for what else is trainable.

    Raises:
        UnsupportedLayerError: see `scalora.model.adapters.find_lora_pairs`.
    """
    pairs = find_lora_pairs(model)
    others = not_in_pairs(model, pairs)
    return LoraProOptimizer(pairs, others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


@dataclass(frozen=True)
class LoraPro(Method):
    """LoRA trained with `LoraProOptimizer`."""

    learning_rate: ClassVar[float | None] = 1e-4
    """Full fine-tuning's size, because the step is full fine-tuning's; the reference's scripts train Llama-2-7B with
    2e-5."""

    def optimizer(self, model: nn.Module, arguments: TrainingArguments) -> Optimizer:
        """LoRA-Pro's AdamW with the Trainer's settings for AdamW."""
        return create_lora_pro_optimizer(model, **adamw_arguments(arguments))
