"""One step of ScaLoRA on a single layer, written as in the paper (Algorithm 1, with Adam): for reading and for tests.

Everything is dense and in the paper's order: G itself, a least-squares problem of m·n equations for the scaling, the
merge, the transport, Adam. This costs what the method avoids, and shares no code with it. `scalora.ScaLora` does the
same for all layers of a model, from LoRA's own gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class LayerState(NamedTuple):
    """A layer ``W + s·A·Bᵀ`` and Adam's moments of its factors.

    Attributes:
        weight: W, the frozen weight, (m, n).
        A: PEFT's ``lora_B.weight``, (m, r).
        B: PEFT's ``lora_A.weight`` transposed, (n, r).
        first_A: Adam's first moment of A, (m, r).
        first_B: Adam's first moment of B, (n, r).
        second_A: Adam's second moment of A, (m, r).
        second_B: Adam's second moment of B, (n, r).
        step: number of steps taken.
    """

    weight: Float[Tensor, "m n"]
    A: Float[Tensor, "m r"]
    B: Float[Tensor, "n r"]
    first_A: Float[Tensor, "m r"]
    first_B: Float[Tensor, "n r"]
    second_A: Float[Tensor, "m r"]
    second_B: Float[Tensor, "n r"]
    step: int

    @classmethod
    def start(cls, weight: Float[Tensor, "m n"], A: Float[Tensor, "m r"], B: Float[Tensor, "n r"]) -> LayerState:
        """A layer before its first step, with zero moments.

        Args:
            weight: W, the frozen weight, (m, n).
            A: PEFT's ``lora_B.weight``, (m, r). Not zero: a zero factor has no optimal scaling.
            B: PEFT's ``lora_A.weight`` transposed, (n, r). Not zero.
        """
        zero_A, zero_B = torch.zeros_like(A), torch.zeros_like(B)
        return cls(weight, A, B, zero_A, zero_B, zero_A, zero_B, 0)


def reference_factors(
    G: Float[Tensor, "m n"], A: Float[Tensor, "m r"], B: Float[Tensor, "n r"], target_norm: float
) -> tuple[Float[Tensor, " r"], Float[Tensor, " r"]]:
    """α and β by the paper's rule: the column optimum if it is positive, else the scalar one if it is, else ones.

    Args:
        G: gradient of the loss in the layer's whole weight, (m, n).
        A: PEFT's ``lora_B.weight``, (m, r).
        B: PEFT's ``lora_A.weight`` transposed, (n, r).
        target_norm: ``1/√(Lη)``.

    Returns:
        α, (r,), and β, (r,).
    """
    r = A.shape[1]
    # G ≈ Σᵢ vᵢ·aᵢ(Gᵀaᵢ)ᵀ + Σⱼ v₍ᵣ₊ⱼ₎·(G bⱼ)bⱼᵀ
    terms = [torch.outer(A[:, i], G.T @ A[:, i]) for i in range(r)]
    terms += [torch.outer(G @ B[:, j], B[:, j]) for j in range(r)]
    X = torch.stack([term.flatten() for term in terms], dim=1)
    of_columns = torch.linalg.lstsq(X, G.flatten()[:, None]).solution[:, 0]
    summed = torch.stack([X[:, :r].sum(1), X[:, r:].sum(1)], dim=1)
    of_factors = torch.linalg.lstsq(summed, G.flatten()[:, None]).solution[:, 0].repeat_interleave(r)
    for v in (of_columns, of_factors):
        if bool((v > 0).all()):
            factors = target_norm * v.sqrt()
            return factors[:r], factors[r:]
    return torch.ones_like(of_columns[:r]), torch.ones_like(of_columns[r:])


def reference_step(
    state: LayerState,
    G: Float[Tensor, "m n"],
    *,
    scaling: float,
    learning_rate: float,
    target_norm: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> LayerState:
    """One step of ScaLoRA with Adam.

    Args:
        state: the layer before the step; it is not modified.
        G: gradient of the loss in the layer's whole weight ``W + s·A·Bᵀ``, (m, n).
        scaling: s, the adapter's scaling (PEFT's ``lora_alpha / r``).
        learning_rate: learning rate of this step.
        target_norm: ``1/√(Lη)``, with η the base learning rate.
        betas: Adam's decay rates of the first and second moment.
        eps: Adam's epsilon.

    Returns:
        The layer after the step.
    """
    W, A, B, first_A, first_B, second_A, second_B, step = state
    grad_A, grad_B = scaling * G @ B, scaling * G.T @ A

    alpha, beta = reference_factors(G, A, B, target_norm)
    scaled_A, scaled_B = A * alpha, B * beta
    W = W + scaling * A @ B.T - scaling * scaled_A @ scaled_B.T

    # ∂ℓ/∂Ã = (∂ℓ/∂A)·diag(β) and ∂ℓ/∂B̃ = (∂ℓ/∂B)·diag(α); the moments have degree 1 and 2 in the gradient.
    grad_A, first_A, second_A = grad_A * beta, first_A * beta, second_A * beta**2
    grad_B, first_B, second_B = grad_B * alpha, first_B * alpha, second_B * alpha**2

    step += 1
    beta1, beta2 = betas
    first_A = beta1 * first_A + (1 - beta1) * grad_A
    first_B = beta1 * first_B + (1 - beta1) * grad_B
    second_A = beta2 * second_A + (1 - beta2) * grad_A**2
    second_B = beta2 * second_B + (1 - beta2) * grad_B**2
    first, second = 1 - beta1**step, 1 - beta2**step
    A = scaled_A - learning_rate * (first_A / first) / ((second_A / second).sqrt() + eps)
    B = scaled_B - learning_rate * (first_B / first) / ((second_B / second).sqrt() + eps)
    return LayerState(W, A, B, first_A, first_B, second_A, second_B, step)
