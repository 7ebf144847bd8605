"""PEFT's tensors of a layer as the matrices of the paper, which they are in other shapes for some layers (PEFT 0.21).

Experts that are one parameter (`ParamWrapper`): the parameter is (E, m, n) or (E, n, m). Rows e·r to (e + 1)·r of
``lora_A``, (E·r, n), are those of expert e, and every E-th column of ``lora_B``, (m, r·E), from the e-th on.

Convolutions are linear maps of patches: the weight is (m, inputs, …), ``lora_A`` (r, inputs, …) with the same kernel,
and ``lora_B`` (m, r, 1, …), so n counts the entries of a patch.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def stack_of_A(lora_A: Shaped[Tensor, "rows ..."], experts: int) -> Shaped[Tensor, "experts r n"]:
    """What has the shape of ``lora_A`` as a matrix for each expert, as a view.

    Args:
        lora_A: PEFT's ``lora_A.weight``, its gradient or an entry of the optimizer's state.
        experts: E; 1 if the layer is one matrix.
    """
    return lora_A.view(experts, len(lora_A) // experts, -1)


def stack_of_B(lora_B: Shaped[Tensor, "m columns ..."], experts: int) -> Shaped[Tensor, "experts m r"]:
    """What has the shape of ``lora_B`` as a matrix for each expert, as a view.

    Args:
        lora_B: PEFT's ``lora_B.weight``, its gradient or an entry of the optimizer's state.
        experts: E; 1 if the layer is one matrix.
    """
    return lora_B.view(len(lora_B), -1, experts).permute(2, 0, 1)


def stack_of_weight(weight: Shaped[Tensor, ...], experts: int) -> Shaped[Tensor, "experts rows columns"]:
    """What has the shape of a layer's base weight as a matrix for each expert, as it is stored, as a view.

    Args:
        weight: the weight, or what is kept beside it.
        experts: E; 1 if the layer is one matrix.
    """
    return weight if experts > 1 else weight.view(1, len(weight), -1)


def matrices_of(
    lora_A: Float[Tensor, "rows ..."], lora_B: Float[Tensor, "m columns ..."], experts: int
) -> tuple[Float[Tensor, "*experts r n"], Float[Tensor, "*experts m r"]]:
    """The factors as matrices, as views; those of experts have a first dimension for them.

    Args:
        lora_A: PEFT's ``lora_A.weight``.
        lora_B: PEFT's ``lora_B.weight``.
        experts: E; 1 if the layer is one matrix.
    """
    A, B = stack_of_A(lora_A, experts), stack_of_B(lora_B, experts)
    return (A[0], B[0]) if experts == 1 else (A, B)


def stored_factors(
    A: Float[Tensor, "*experts r n"],
    B: Float[Tensor, "*experts m r"],
    like: tuple[Float[Tensor, "rows ..."], Float[Tensor, "m columns ..."]],
) -> tuple[Float[Tensor, "new_rows ..."], Float[Tensor, "m new_columns ..."]]:
    """The inverse of `matrices_of`, also for another rank.

    Args:
        A: the matrices of lora_A.
        B: the matrices of lora_B.
        like: PEFT's lora_A and lora_B, of any rank.
    """
    lora_A, lora_B = like
    if A.ndim == 3:
        A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    return A.reshape(-1, *lora_A.shape[1:]), B.reshape(len(B), -1, *lora_B.shape[2:])


def is_viewable(tensor: Tensor) -> bool:
    """Whether the functions above can view a tensor: not if a convolution's is in the order "channels last".

    Args:
        tensor: the tensor.
    """
    return tensor.ndim == 2 or tensor.is_contiguous(memory_format=torch.contiguous_format)
