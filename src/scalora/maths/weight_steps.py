"""How far a step of a LoRA adapter's factors moves the weight, and how far it turns the factors (beyond the paper).

Two numbers that mean the same for every shape, rank and scaling. With steps whose entries are of order 1 (Adam's, or
those of `scalora.maths.pair_moments`), a step of size ``δ`` on both factors moves an entry of the weight W (m × n) by

    μ = s·δ·√(‖A‖²/m + ‖B‖²/n)

in root mean square, and turns columns of norm τ and length d by ``θ = δ·√d/τ``. So a learning rate for μ, which is the
size of full fine-tuning's, determines δ from the factors as they are; and a turn θ determines the norm τ of orthonormal
columns.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def step_sizes(
    A: Float[Tensor, "*layers m r"], B: Float[Tensor, "*layers n r"], scaling: Float[Tensor, "*#layers"] | float
) -> Float[Tensor, "*layers"]:
    """The step size δ of both factors with which an entry of the weight moves by 1 in root mean square.

    Args:
        A: PEFT's ``lora_B.weight``, (…, m, r).
        B: PEFT's ``lora_A.weight`` transposed, (…, n, r).
        scaling: s, PEFT's scaling: of each layer, (…), or of all of them.

    Returns:
        ``1/(s·√(‖A‖²/m + ‖B‖²/n))``, (…); zero where both factors or the scaling are zero.
    """
    of_A, of_B = (torch.linalg.vector_norm(f, dim=(-2, -1)) / f.shape[-2] ** 0.5 for f in (A, B))
    moved = (scaling * torch.hypot(of_A, of_B)).abs()
    sizes: Tensor = torch.where(moved > 0, moved.reciprocal(), 0)
    return sizes


def norm_for_turn(turn: float, learning_rate: float, scaling: float, m: int, n: int, r: int) -> float:
    """The norm τ of orthonormal columns that a step turns by a given angle.

    Args:
        turn: θ, the angle in radians by which a step turns a column (for columns of different length in A and B, the
            geometric mean of both).
        learning_rate: μ, by how much a step moves an entry of the weight in root mean square.
        scaling: s, PEFT's scaling.
        m: rows of the weight (out_features).
        n: columns of the weight (in_features).
        r: the adapter's rank.

    Returns:
        τ, with ``τ² = μ·(mn)^(3/4) / (s·θ·√(r·(m + n)))``.
    """
    return math.sqrt(learning_rate * (m * n) ** 0.75 / (abs(scaling) * turn * math.sqrt(r * (m + n))))
