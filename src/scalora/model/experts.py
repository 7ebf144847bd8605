"""How PEFT keeps the factors of a stack of experts in two matrices (`ParamWrapper`; checked with PEFT 0.21).

The E experts of a layer are one parameter, (E, m, n) or (E, n, m). Rows e·r to (e + 1)·r of ``lora_A``, (E·r, n), are
those of expert e, and every E-th column of ``lora_B``, (m, r·E), from the e-th on.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def rows_of_experts(lora_A: Float[Tensor, "rows n"], experts: int) -> Float[Tensor, "experts r n"]:
    """The rows of each expert, as a view.

    Args:
        lora_A: PEFT's ``lora_A.weight``, or a tensor of its shape.
        experts: the number of experts.
    """
    return lora_A.view(experts, -1, lora_A.shape[1])


def columns_of_experts(lora_B: Float[Tensor, "m columns"], experts: int) -> Float[Tensor, "experts m r"]:
    """The columns of each expert, as a view.

    Args:
        lora_B: PEFT's ``lora_B.weight``, or a tensor of its shape.
        experts: the number of experts.
    """
    return lora_B.view(len(lora_B), -1, experts).permute(2, 0, 1)


def joined_rows(of_experts: Float[Tensor, "experts r n"]) -> Float[Tensor, "rows n"]:
    """The inverse of `rows_of_experts`.

    Args:
        of_experts: the rows of each expert.
    """
    return of_experts.flatten(0, 1)


def joined_columns(of_experts: Float[Tensor, "experts m r"]) -> Float[Tensor, "m columns"]:
    """The inverse of `columns_of_experts`.

    Args:
        of_experts: the columns of each expert.
    """
    return of_experts.permute(1, 2, 0).flatten(1)


def matrices_of(
    lora_A: Float[Tensor, "rows n"], lora_B: Float[Tensor, "m columns"], experts: int
) -> tuple[Float[Tensor, "*experts r n"], Float[Tensor, "*experts m r"]]:
    """The factors of each expert, as views; of a layer that is one matrix, its factors.

    Args:
        lora_A: PEFT's ``lora_A.weight``.
        lora_B: PEFT's ``lora_B.weight``.
        experts: the number of experts; 1 for one matrix.
    """
    if experts == 1:
        return lora_A, lora_B
    return rows_of_experts(lora_A, experts), columns_of_experts(lora_B, experts)


def factors_of_matrices(
    A: Float[Tensor, "*experts r n"], B: Float[Tensor, "*experts m r"]
) -> tuple[Float[Tensor, "rows n"], Float[Tensor, "m columns"]]:
    """The inverse of `matrices_of`.

    Args:
        A: the rows of each expert.
        B: the columns of each expert.
    """
    return (A, B) if A.ndim == 2 else (joined_rows(A), joined_columns(B))
