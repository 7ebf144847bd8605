"""`scalora.rescale.kernels` in C++: each operation takes all layers at once and passes once over memory.

PyTorch's own operations are the reference, and do what the C++ can't: other dtypes, transposed weights, factored
remainders, rounding errors in 8 bits, other devices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from scalora.maths.scaling import Grams
from scalora.rescale import kernels
from scalora.rescale.native.compiler import load_operations
from scalora.rescale.remainder import DenseRemainder, Remainder


def build() -> kernels.Kernels:
    """Compile and load the C++, and return its operations.

    Raises:
        NativeBuildError: there is no compiler, or it fails, or others could write to the cache.
    """
    load_operations()
    return kernels.Kernels(grams, merge, expand_factors, multiply)


def grams(
    lora_B: Sequence[Float[Tensor, "m r"]],
    grad_B: Sequence[Float[Tensor, "m r"]],
    lora_A: Sequence[Float[Tensor, "r n"]],
    grad_A: Sequence[Float[Tensor, "r n"]],
) -> Grams:
    """`kernels.grams` in C++, for contiguous float32 on a CPU; PyTorch does anything else."""
    if not _are_plain(lora_B, grad_B, lora_A, grad_A):
        return kernels.grams(lora_B, grad_B, lora_A, grad_A)
    return Grams(*torch.ops.scalora.grams(lora_B, grad_B, lora_A, grad_A))


def merge(
    remainders: Sequence[Remainder],
    weights: Sequence[Tensor],
    lora_B: Sequence[Float[Tensor, "m r"]],
    lora_A: Sequence[Float[Tensor, "r n"]],
    coefficients: Float[Tensor, "layers r"],
) -> None:
    """`kernels.merge` in C++, for float32 and bfloat16 weights that are stored (m, n); PyTorch does anything else."""
    upright = [r for r in remainders if isinstance(r, DenseRemainder) and not r.transposed]
    rounded_off = [r.rounded_off for r in upright if r.rounded_off is not None]
    of_half = len(rounded_off) == len(weights) and _are_plain(rounded_off, dtype=torch.int16)
    weights_fit = _are_plain(weights, dtype=torch.bfloat16) if of_half else not rounded_off and _are_plain(weights)
    if not (weights_fit and len(upright) == len(weights) and _are_plain(lora_B, lora_A)):
        kernels.merge(remainders, weights, lora_B, lora_A, coefficients)
        return
    torch.ops.scalora.merge_(weights, rounded_off, lora_B, lora_A, coefficients.contiguous())
    for remainder in upright:
        remainder.changed = True


def expand_factors(factors: Float[Tensor, "layers rows columns"], like: Sequence[Tensor]) -> list[Tensor]:
    """`kernels.expand_factors` without copies."""
    return list(factors.expand(len(like), *like[0].shape).unbind())


def multiply(tensors: Sequence[Tensor], factors: Sequence[Tensor], power: int = 1) -> None:
    """`kernels.multiply` in C++, for contiguous float32 on a CPU; PyTorch does anything else."""
    if not (_are_plain(tensors) and all(f.is_cpu and f.dtype == torch.float32 for f in factors)):
        kernels.multiply(tensors, factors, power)
        return
    torch.ops.scalora.multiply_(tensors, factors, power)


def _are_plain(*lists: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> bool:
    return all(t.is_cpu and t.dtype == dtype and t.is_contiguous() for tensors in lists for t in tensors)
