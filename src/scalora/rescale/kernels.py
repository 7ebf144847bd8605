"""What a rescale does to the tensors of layers of one shape, in PyTorch's own operations: on any device.

The number of operations does not depend on the number of layers, except for merges into the weights where there is no
Triton (`scalora.rescale.one_pass`).
`scalora.rescale.native` does the same in C++ on CPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scalora.maths.scaling import Grams
from scalora.maths.scaling import grams as grams_of_stacks
from scalora.rescale import one_pass
from scalora.rescale.remainder import Remainder, add_to_all, scale_columns

Multiply = Callable[..., None]
"""A function with the arguments of `multiply`."""


class Kernels(NamedTuple):
    """The four operations in one implementation: `PYTORCH`, or what `scalora.rescale.native.build` returns.

    Attributes:
        grams: inner products of factors and gradients.
        merge: adds what a rescale takes out of the factors to the remainders.
        expand_factors: brings factors of rows or columns into the shape that `multiply` takes.
        multiply: multiplies tensors by powers of their factors.
    """

    grams: Callable[..., Grams]
    merge: Callable[..., None]
    expand_factors: Callable[..., list[Tensor]]
    multiply: Multiply


def grams(
    lora_B: Sequence[Float[Tensor, "m r"]],
    grad_B: Sequence[Float[Tensor, "m r"]],
    lora_A: Sequence[Float[Tensor, "r n"]],
    grad_A: Sequence[Float[Tensor, "r n"]],
) -> Grams:
    """The inner products that the optimum of each layer depends on, see `scalora.maths.scaling.grams`.

    Args:
        lora_B: the layers' ``lora_B`` weights, the paper's A.
        grad_B: their gradients, ``s·G·B``.
        lora_A: the layers' ``lora_A`` weights, the paper's Bᵀ.
        grad_A: their gradients, ``s·(Gᵀ·A)ᵀ``.
    """
    A, GB, Bt, GtAt = map(torch.stack, (lora_B, grad_B, lora_A, grad_A))  # type: ignore[arg-type]
    return grams_of_stacks(A, Bt.mT, GB, GtAt.mT)


def merge(
    remainders: Sequence[Remainder],
    weights: Sequence[Tensor],
    lora_B: Sequence[Float[Tensor, "m r"]],
    lora_A: Sequence[Float[Tensor, "r n"]],
    coefficients: Float[Tensor, "layers r"],
) -> None:
    """Add ``lora_B · diag(coefficients) · lora_A`` to each layer's remainder.

    Args:
        remainders: the layers' remainders; factored ones after `FactoredRemainder.make_room`.
        weights: the layers' base weights, as they are stored.
        lora_B: the layers' ``lora_B`` weights.
        lora_A: the layers' ``lora_A`` weights.
        coefficients: (layers, r); a column with exactly 0 is left out, whatever the weights hold there.
    """
    if one_pass.merge(remainders, weights, lora_B, lora_A, coefficients):
        return
    left, right = scale_columns(torch.stack(list(lora_B)), torch.stack(list(lora_A)).mT, coefficients)
    add_to_all(remainders, weights, left, right)


def expand_factors(factors: Float[Tensor, "layers rows columns"], like: Sequence[Tensor]) -> list[Tensor]:
    """Bring factors of rows or columns into the shape of the parameters that they multiply.

    Args:
        factors: (layers, 1, columns), (layers, rows, 1), or (layers, 1, 1).
        like: the layers' parameters.
    """
    # In the layout of the parameters, so that one kernel handles all of them.
    return list(factors.expand(len(like), *like[0].shape).contiguous().unbind())


def multiply(tensors: Sequence[Tensor], factors: Sequence[Tensor], power: int = 1) -> None:
    """Multiply each tensor by a power of its factor, in place.

    Args:
        tensors: parameters, gradients or entries of the optimizer's state.
        factors: one for each tensor, from `expand_factors`.
        power: at least 1. Applied as so many products, which needs no copy of the factors.
    """
    for _ in range(power):
        torch._foreach_mul_(list(tensors), list(factors))


PYTORCH = Kernels(grams, merge, expand_factors, multiply)
"""The operations in PyTorch."""
