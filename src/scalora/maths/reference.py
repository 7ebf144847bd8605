"""One step of ScaLoRA on a single layer, written as in the paper (Algorithm 1, with Adam): for reading and for tests.

Everything is dense and in the paper's order: G itself, a least-squares problem of m·n equations for the scaling, the
merge, the transport, Adam. This costs what the method avoids, and shares no code with it. `scalora.ScaLora` does the
same for all layers of a model, from LoRA's own gradients.

`reference_step` is the paper's. `reference_matrix_step` is one of matrix scaling with `scalora.PairAdamW`, which goes
beyond it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scalora.maths.mode import Optimum


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

        Returns:
            The layer.
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


class PairState(NamedTuple):
    """A layer ``W + s·A·Bᵀ`` and the moments that `scalora.PairAdamW` keeps of its factors.

    Attributes:
        weight: W, the frozen weight, (m, n).
        A: PEFT's ``lora_B.weight``, (m, r).
        B: PEFT's ``lora_A.weight`` transposed, (n, r).
        first_A: first moment of A, (m, r).
        first_B: first moment of B, (n, r).
        second_A: second moment of A, the moving average of ``gᵀg/m``, (r, r).
        second_B: second moment of B, the moving average of ``gᵀg/n``, (r, r).
        rows_A: weights of A's rows, the moving average of ``gᵢ·V̂⁻¹·gᵢᵀ/r``, (m,).
        rows_B: weights of B's rows, (n,).
        step: number of steps taken.
    """

    weight: Float[Tensor, "m n"]
    A: Float[Tensor, "m r"]
    B: Float[Tensor, "n r"]
    first_A: Float[Tensor, "m r"]
    first_B: Float[Tensor, "n r"]
    second_A: Float[Tensor, "r r"]
    second_B: Float[Tensor, "r r"]
    rows_A: Float[Tensor, " m"]
    rows_B: Float[Tensor, " n"]
    step: int

    @classmethod
    def start(cls, weight: Float[Tensor, "m n"], A: Float[Tensor, "m r"], B: Float[Tensor, "n r"]) -> PairState:
        """A layer before its first step, with zero moments.

        Args:
            weight: W, the frozen weight, (m, n).
            A: PEFT's ``lora_B.weight``, (m, r). Of rank r if the first step rescales.
            B: PEFT's ``lora_A.weight`` transposed, (n, r). Of rank r if the first step rescales.

        Returns:
            The layer.
        """
        square = A.new_zeros(A.shape[1], A.shape[1])
        rows_A, rows_B = A.new_zeros(len(A)), B.new_zeros(len(B))
        return cls(weight, A, B, torch.zeros_like(A), torch.zeros_like(B), square, square, rows_A, rows_B, 0)


def reference_matrices(
    G: Float[Tensor, "m n"],
    A: Float[Tensor, "m r"],
    B: Float[Tensor, "n r"],
    target_norm: float,
    optimum: Optimum = "polar",
) -> tuple[Float[Tensor, "r r"], Float[Tensor, "r r"]]:
    """P and Q of a matrix scaling, ``Ã = A·P`` and ``B̃ = B·Q``.

    Args:
        G: gradient of the loss in the layer's whole weight, (m, n). Not used for ``"polar"``.
        A: PEFT's ``lora_B.weight``, (m, r), of rank r.
        B: PEFT's ``lora_A.weight`` transposed, (n, r), of rank r.
        target_norm: ``1/√(Lη)``.
        optimum: ``"polar"`` makes both factors orthonormal; ``"exact"`` minimises the loss bound over all matrices.

    Returns:
        P and Q, (r, r) each.
    """
    to_A, to_B = _power(A.T @ A, -0.5), _power(B.T @ B, -0.5)
    P, Q = target_norm * to_A, target_norm * to_B
    if optimum == "polar":
        return P, Q
    # G ≈ U_A·X·K + N·Y·U_Bᵀ over symmetric X and Y, which the last equations keep near 1 if G does not determine them.
    U_A, U_B, r = A @ to_A, B @ to_B, A.shape[1]
    K, N = U_A.T @ G, G @ U_B
    basis = []
    for i in range(r):
        for j in range(i + 1):
            E = A.new_zeros(r, r)
            E[i, j] = E[j, i] = 1
            basis.append(E / E.norm())
    terms = [U_A @ E @ K for E in basis] + [N @ E @ U_B.T for E in basis]
    near_one = (1e-10 * (K.square().sum() + N.square().sum())).sqrt() * torch.eye(len(terms)).to(A)
    equations = torch.cat([torch.stack([term.flatten() for term in terms], dim=1), near_one])
    left = torch.cat([(G - U_A @ K - N @ U_B.T).flatten(), A.new_zeros(len(terms))])
    found = torch.linalg.lstsq(equations, left[:, None]).solution[:, 0]
    X, Y = torch.eye(r).to(A) + torch.einsum("kx,xij->kij", found.view(2, -1), torch.stack(basis))
    # An eigenvalue of zero would take a direction out of the factor for good.
    return P @ _power(X, 0.5, smallest=1e-3), Q @ _power(Y, 0.5, smallest=1e-3)


def reference_matrix_step(
    state: PairState,
    G: Float[Tensor, "m n"],
    *,
    scaling: float,
    learning_rate: float,
    target_norm: float,
    optimum: Optimum = "polar",
    rescale: bool = True,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> PairState:
    """One step of ScaLoRA with ``mode="matrix"`` and `scalora.PairAdamW`.

    Args:
        state: the layer before the step; it is not modified.
        G: gradient of the loss in the layer's whole weight ``W + s·A·Bᵀ``, (m, n).
        scaling: s, the adapter's scaling (PEFT's ``lora_alpha / r``).
        learning_rate: by how much this step moves an entry of the weight, in root mean square.
        target_norm: ``1/√(Lη)``, the norm of the orthonormal columns.
        optimum: the matrices that are chosen, as in `reference_matrices`.
        rescale: whether this step is preceded by a rescale. Without, it is a step of LoRA with `scalora.PairAdamW`.
        betas: decay rates of the first and second moments.
        eps: Adam's epsilon.

    Returns:
        The layer after the step.
    """
    W, A, B, first_A, first_B, second_A, second_B, rows_A, rows_B, step = state
    grad_A, grad_B = scaling * G @ B, scaling * G.T @ A

    if rescale:
        P, Q = reference_matrices(G, A, B, target_norm, optimum)
        W = W + scaling * A @ B.T - scaling * (A @ P) @ (B @ Q).T
        A, B = A @ P, B @ Q
        # ∂ℓ/∂Ã = (∂ℓ/∂A)·Q and ∂ℓ/∂B̃ = (∂ℓ/∂B)·P; the rows' weights are the same for any P and Q.
        grad_A, first_A, second_A = grad_A @ Q, first_A @ Q, Q.T @ second_A @ Q
        grad_B, first_B, second_B = grad_B @ P, first_B @ P, P.T @ second_B @ P

    step += 1
    first_A, second_A, rows_A = _moments(grad_A, first_A, second_A, rows_A, step, betas)
    first_B, second_B, rows_B = _moments(grad_B, first_B, second_B, rows_B, step, betas)
    direction_A = _direction(first_A, second_A, rows_A, step, betas, eps)
    direction_B = _direction(first_B, second_B, rows_B, step, betas, eps)
    # Directions of entries of size 1 move an entry of W by this: see scalora.maths.weight_steps.
    moved = abs(scaling) * (A.square().sum() / len(A) + B.square().sum() / len(B)).sqrt()
    A = A - learning_rate / moved * direction_A
    B = B - learning_rate / moved * direction_B
    return PairState(W, A, B, first_A, first_B, second_A, second_B, rows_A, rows_B, step)


def _moments(
    grad: Float[Tensor, "d r"],
    first: Float[Tensor, "d r"],
    second: Float[Tensor, "r r"],
    rows: Float[Tensor, " d"],
    step: int,
    betas: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """The moments of one factor after a step, whose number counts from 1."""
    beta1, beta2 = betas
    d, r = grad.shape
    first = beta1 * first + (1 - beta1) * grad
    second = beta2 * second + (1 - beta2) * grad.T @ grad / d
    inverse = torch.linalg.pinv(second / (1 - beta2**step), hermitian=True, rtol=1e-13)
    rows = beta2 * rows + (1 - beta2) * (grad @ inverse * grad).sum(1) / r
    return first, second, rows


def _direction(
    first: Float[Tensor, "d r"],
    second: Float[Tensor, "r r"],
    rows: Float[Tensor, " d"],
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> Float[Tensor, "d r"]:
    """The direction of one factor's step, with entries of order 1."""
    first, second, rows = first / (1 - betas[0] ** step), second / (1 - betas[1] ** step), rows / (1 - betas[1] ** step)
    r = first.shape[1]
    damped = second + (1e-10 * second.trace() / r + eps**2) * torch.eye(r).to(second)
    return first @ _power(damped, -0.5) / (rows.sqrt() + eps)[:, None]


def _power(matrix: Float[Tensor, "r r"], power: float, *, smallest: float = 0.0) -> Float[Tensor, "r r"]:
    """A power of a symmetric matrix with eigenvalues of at least `smallest`."""
    values, vectors = torch.linalg.eigh(matrix)
    result: Tensor = vectors @ torch.diag(values.clamp_min(smallest) ** power) @ vectors.T
    return result
