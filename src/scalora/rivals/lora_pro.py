"""LoRA-Pro: an optimizer for LoRA whose steps change the weight as closely as possible to a step of full fine-tuning.

Wang et al., "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", ICLR 2025, arXiv:2407.18242. Notation is the paper's
and PEFT's: ``W = W₀ + s·B·A`` with A (r × n) = ``lora_A``, B (m × r) = ``lora_B``, the scaling s, and the gradient
``g = ∂ℓ/∂W`` (m × n), of which LoRA computes only ``g_A = s·Bᵀg`` and ``g_B = s·g·Aᵀ``. Moving the factors by (d_A,
d_B) moves the weight by the *equivalent gradient* ``s·(B·d_A + d_B·A)``. It is closest to g in the Frobenius norm for

    d_A = (BᵀB)⁻¹ g_A / s² + X·A,      d_B = (I − B(BᵀB)⁻¹Bᵀ) g_B (AAᵀ)⁻¹ / s² − B·X

with any X (r × r), which cancels in the equivalent gradient. Among these, (d_A, d_B) is closest to (g_A, g_B) for the
solution of the Sylvester equation ``BᵀB·X + X·AAᵀ = −(BᵀB)⁻¹ g_A Aᵀ / s²``.

One thing differs from the authors' code: with full moments it applies the weight decay to the frozen weight, too, after
which the adapter would be wrong on the original base. Here, weight decay applies to the factors only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from scalora.integrations.transformers import adamw_arguments
from scalora.maths.scaling import solver_dtype
from scalora.model.adapters import LoraPair, find_lora_pairs
from scalora.rivals.method import Method
from scalora.rivals.pair_optimizer import PairOptimizer, adam_direction, not_in_pairs

# Damping of both Gram matrices, as in the authors' code. It determines the second step from lora_B = 0, when BᵀB is of
# the order of the squared learning rate.
_DAMPING = 1e-8

_LEARNING_RATE = 1e-4


class _Grams(NamedTuple):
    """Eigenvalues (ascending, not negative) and eigenvectors of ``AAᵀ`` and ``BᵀB``."""

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
    """The part of the full gradient that the factors can follow, ``g − (I − P_B)·g·(I − P_A)``.

    P_A and P_B are the projections onto the row space of ``lora_A`` and the column space of ``lora_B``. LoRA's own
    gradients determine it.

    Args:
        lora_A: A, (r, n).
        lora_B: B, (m, r). Zeros are allowed, as in PEFT's initialisation.
        grad_A: gradient of ``lora_A``, ``s·Bᵀg``, (r, n).
        grad_B: gradient of ``lora_B``, ``s·g·Aᵀ``, (m, r).
        scaling: s, not zero.

    Returns:
        The equivalent gradient, (m, n), in the dtype of ``lora_A``. Inverses are computed in float64 if the device
        supports it.
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
    """The pair (d_A, d_B) with the best equivalent gradient that is closest to LoRA's own gradients.

    Args:
        lora_A: A, (r, n).
        lora_B: B, (m, r). Zeros are allowed, as in PEFT's initialisation.
        grad_A: gradient of ``lora_A``, ``s·Bᵀg``, (r, n).
        grad_B: gradient of ``lora_B``, ``s·g·Aᵀ``, (m, r).
        scaling: s, not zero.

    Returns:
        d_A (r, n) and d_B (m, r), in the dtype of ``lora_A``. Inverses are computed in float64 if the device supports
        it.
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
    """The solution X of ``BᵀB·X + X·AAᵀ = rhs``, which is diagonal in the eigenbases of the two Gram matrices."""
    sums = grams.values_B[:, None] + grams.values_A[None, :]
    # Where a sum is zero, so is the right-hand side.
    solution = (grams.vectors_B.mT @ rhs @ grams.vectors_A) / sums.clamp_min(torch.finfo(sums.dtype).tiny)
    return grams.vectors_B @ solution @ grams.vectors_A.mT


class LoraProOptimizer(PairOptimizer):
    """LoRA-Pro with AdamW (the paper's Algorithm 2): Adam on the equivalent gradient, projected back onto the factors.

    In each step and for each pair, the equivalent gradient is computed from LoRA's gradients, and Adam's moments of it
    give a direction D, as in full fine-tuning. ``s·BᵀD`` and ``s·D·Aᵀ`` then take the place of LoRA's gradients, are
    adjusted, and make the step. The weight follows Adam's step in full fine-tuning as closely as the factors can, and
    learning rates are on the scale of full fine-tuning. With ``lora_B`` = 0, the first step moves ``lora_B`` only, as
    in the authors' code. Parameters outside the pairs are trained by AdamW.

    **Memory.** A pair has two moments of shape (m, n) in the adapter's dtype: 8·m·n bytes per layer in float32, as much
    as AdamW in full fine-tuning, compared with 8·r·(m + n) for LoRA. With adapters on the linear layers of a model with
    7 billion weights, the moments take about 50 GB.

    Args:
        pairs: the LoRA pairs of a model. A pair without gradients is skipped in that step.
        others: the other trainable parameters.
        lr: learning rate of the weight.
        betas: decay rates of Adam's moments.
        eps: term added to Adam's denominator for numerical stability.
        weight_decay: decoupled weight decay of ``lora_A``, ``lora_B`` and the other parameters, as in AdamW.
    """

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
    lr: float = _LEARNING_RATE,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> LoraProOptimizer:
    """Create a `LoraProOptimizer` for a PEFT model, with AdamW for the parameters outside its LoRA pairs.

    Args:
        model: a model with PEFT LoRA layers and exactly one active adapter.
        lr: learning rate of the weight, on the scale of full fine-tuning.
        betas: decay rates of Adam's moments. The default is AdamW's.
        eps: term added to Adam's denominator for numerical stability. The default is AdamW's.
        weight_decay: decoupled weight decay.

    Raises:
        UnsupportedLayerError: a layer that `scalora.model.adapters.find_lora_pairs` rejects.
    """
    pairs = find_lora_pairs(model)
    others = not_in_pairs(model, pairs)
    return LoraProOptimizer(pairs, others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


@dataclass(frozen=True)
class LoraPro(Method):
    """LoRA-Pro: LoRA trained by `LoraProOptimizer`."""

    steps_entries: ClassVar[bool] = False
    learning_rate: ClassVar[float | None] = _LEARNING_RATE
    """On the scale of full fine-tuning, because steps are those of full fine-tuning. The authors' scripts train
    Llama-2-7B at 2e-5."""

    def optimizer(self, model: nn.Module, arguments: TrainingArguments) -> Optimizer:
        """The LoRA-Pro optimizer.

        Args:
            model: the model to train, with LoRA layers.
            arguments: the training arguments, with the settings of AdamW.

        Raises:
            UnsupportedLayerError: a layer that `scalora.model.adapters.find_lora_pairs` rejects.
        """
        return create_lora_pro_optimizer(model, **adamw_arguments(arguments))
