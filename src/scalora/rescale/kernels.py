"""What a rescale does to the tensors of layers of one shape, in PyTorch's own operations: on any device.

The number of operations does not depend on the number of layers, save for merges into the weights. `native` does the
same in C++ on CPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from scalora.maths.scaling import Grams
from scalora.maths.scaling import grams as grams_of_stacks
from scalora.rescale.remainder import Remainder, add_to_all, scale_columns

Multiply = Callable[..., None]
"""As `multiply`."""


class Kernels(NamedTuple):
    """The four operations as one implementation has them: `PYTORCH`, or what `native.build` returns."""

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
    """The inner products that the optimum of each layer depends on; see `scalora.maths.scaling.grams`."""
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
        remainders: of the layers.
        weights: their base weights.
        lora_B: PEFT's parameters.
        lora_A: likewise.
        coefficients: a column with exactly 0 is left out, whatever the parameters hold there.
    """
    left, right = scale_columns(torch.stack(list(lora_B)), torch.stack(list(lora_A)).mT, coefficients)
    add_to_all(remainders, weights, left.unbind(), right.unbind())


def expand_factors(factors: Float[Tensor, "layers rows columns"], like: Sequence[Tensor]) -> list[Tensor]:
    """Factors of rows or columns as `multiply` takes them: in the shape of the parameters that they are for.

    Args:
        factors: (layers, 1, columns), (layers, rows, 1), or (layers, 1, 1).
        like: the parameters of the layers.
    """
    # Of one layout with the parameters: so that one kernel takes all.
    return list(factors.expand(len(like), *like[0].shape).contiguous().unbind())


def multiply(tensors: Sequence[Tensor], factors: Sequence[Tensor], power: int = 1) -> None:
    """Multiply each tensor by a power of its factor, in place.

    Args:
        tensors: the entries of some parameters.
        factors: from `expand_factors`.
        power: at least 1, applied as so many products: no copy of the factors, and exact where the power is.
    """
    for _ in range(power):
        torch._foreach_mul_(list(tensors), list(factors))


PYTORCH = Kernels(grams, merge, expand_factors, multiply)
