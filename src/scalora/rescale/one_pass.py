"""Merges on a GPU that pass once over memory, for all layers of one shape in one launch of a Triton kernel.

PyTorch's own operations (`scalora.rescale.remainder`) are the reference. They do what the kernel can't: other dtypes
and layouts, devices without Triton.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from scalora.rescale.notices import in_one_line
from scalora.rescale.remainder import HALF, DenseRemainder, Remainder
from scalora.rescale.stochastic import StochasticRemainder, on_device

# Ranks up to this are one block of the product, and the factor of the rows is read once for several tiles. Beyond, what
# the product keeps in registers would exceed them.
_RESIDENT = 64

# With about so many programs, all processors of a large GPU are busy and none works for long after the others.
_PROGRAMS = 1024

# What vector instructions and the kernel's declarations assume of addresses, in bytes.
_ALIGNMENT = 16

# Tables that are kept on the devices. A CUDA graph refers to those it was captured with, so none should ever go in
# practice: there is one for each shape of layers of a model, of a few hundred bytes.
_TABLES = 4096

# What failed at first use, so that it isn't tried again: None for all merges.
_GIVEN_UP: set[tuple[torch.dtype, Rounding, int] | None] = set()


class Rounding(NamedTuple):
    """How the kernel rounds.

    Attributes:
        by: ``"none"`` for float32; ``"kept"`` or ``"stochastic"``.
        bits: of a rounding error that is kept, 16 or 8; else 0.
    """

    by: str
    bits: int

    @classmethod
    def of(cls, remainder: DenseRemainder, dtype: torch.dtype) -> Rounding:
        """How it rounds what is merged into a weight.

        Args:
            remainder: the weight's remainder.
            dtype: dtype of the weight.
        """
        if dtype not in HALF:
            return cls("none", 0)
        low = remainder.rounded_off
        return cls("stochastic", 0) if low is None else cls("kept", 8 * low.element_size())


class Plan(NamedTuple):
    """How the weights of one launch are divided.

    A program handles `tiles` tiles that are side by side, and reads the factor of their rows once if it is resident.

    Attributes:
        block_m: rows of a tile.
        block_n: columns of a tile.
        block_k: columns of the factors that are multiplied at a time; 0: outer products are added one after the other.
        tiles: tiles of a program.
        warps: warps of a program.
        grid: programs of each layer, and layers.
    """

    block_m: int
    block_n: int
    block_k: int
    tiles: int
    warps: int
    grid: tuple[int, int]

    def bytes_of_factors(self, rank: int) -> int:
        """Bytes of factors that all programs together read, if no cache had any of them.

        Args:
            rank: columns of the factors.
        """
        per_layer, layers = self.grid
        of_rows = 1 if self.block_k >= rank else self.tiles
        return 4 * rank * layers * per_layer * (of_rows * self.block_m + self.tiles * self.block_n)


def plan_of(rows: int, columns: int, rank: int, layers: int, dtype: torch.dtype, rounding: Rounding) -> Plan:
    """The division of weights of one shape: of those tried on an H200, the fastest (docs/cost.md).

    Args:
        rows: rows of the weights, as they are stored.
        columns: columns of the weights, as they are stored.
        rank: columns of the factors.
        layers: number of weights.
        dtype: dtype of the weights.
        rounding: how the kernel rounds.
    """
    half_as_fast = dtype == torch.float16  # its roundings take more registers
    # Sums of outer products leave the tensor cores' layout out, which costs less for few columns, but more registers.
    outer = rank < 16 or (rank == 16 and dtype == torch.bfloat16 and rounding.bits == 16)
    if outer:
        return Plan(64, 64, 0, 1, 8 if half_as_fast else 4, _grid(rows, columns, 64, 64, 1, layers))
    block_m, block_n = 128, 32 if rank <= 32 else 64
    block_k = max(16, 1 << (rank - 1).bit_length()) if rank <= _RESIDENT else 32
    in_all = layers * -(-rows // block_m) * -(-columns // block_n)
    tiles = 1 << max(0, (in_all // _PROGRAMS).bit_length() - 1)
    if rank <= _RESIDENT:
        tiles = min(tiles, 16 if rank > 32 else 2 if half_as_fast and rank <= 16 else 4)
    tiles = min(tiles, 1 << (-(-columns // block_n) - 1).bit_length())
    warps = 8 if half_as_fast or rank > _RESIDENT else 4
    return Plan(block_m, block_n, block_k, tiles, warps, _grid(rows, columns, block_m, block_n, tiles, layers))


def _grid(rows: int, columns: int, block_m: int, block_n: int, tiles: int, layers: int) -> tuple[int, int]:
    return -(-rows // block_m) * -(-columns // (block_n * tiles)), layers


def merge(
    remainders: Sequence[Remainder],
    weights: Sequence[Tensor],
    lora_B: Sequence[Float[Tensor, "m r"]],
    lora_A: Sequence[Float[Tensor, "r n"]],
    coefficients: Float[Tensor, "layers r"],
) -> bool:
    """`scalora.rescale.kernels.merge` in one launch, if the kernel can do it.

    Warns once of what should work and does not.

    Args:
        remainders: as there.
        weights: as there.
        lora_B: as there.
        lora_A: as there.
        coefficients: as there.

    Returns:
        Whether it was done. If not, nothing has changed.
    """
    dense = [remainder for remainder in remainders if isinstance(remainder, DenseRemainder)]
    if None in _GIVEN_UP or len(dense) < len(weights) or not _fit(dense, weights, lora_B[0]):
        return False
    written = [*weights, *(r.rounded_off for r in dense if r.rounded_off is not None)]
    kind = weights[0].dtype, Rounding.of(dense[0], weights[0].dtype), lora_B[0].shape[1]
    if kind in _GIVEN_UP:
        return False
    factors = torch.stack(list(lora_B)), torch.stack(list(lora_A))  # may be out of memory, which is not the compiler's
    try:
        _launch(dense, weights, *factors, coefficients)
    except Exception as error:  # whatever a missing or broken compiler leads to, before the kernel has run
        missing = isinstance(error, ImportError)
        _GIVEN_UP.add(None if missing else kind)
        of = "weights" if missing else f"{str(kind[0]).removeprefix('torch.')} weights at rank {kind[2]}"
        warnings.warn(
            f"merges into {of} take several times as long as they could, because the Triton kernel can't be used "
            f"({in_one_line(error)}): PyTorch's own operations take its place",
            stacklevel=3,
        )
        return False
    for tensor in written:
        torch.autograd.graph.increment_version(tensor)
    for remainder in dense:
        if not remainder.changed:  # setting an attribute of a module takes a while
            remainder.changed = True
    return True


def _fit(remainders: Sequence[DenseRemainder], weights: Sequence[Tensor], factor: Tensor) -> bool:
    """Whether the kernel can merge into all these weights at once. Matches the remainders to the weights' dtypes."""
    first, kind, transposed = weights[0], type(remainders[0]), remainders[0].transposed
    if factor.dtype != torch.float32 or first.dtype not in (torch.float32, *HALF) or first.numel() == 0:
        return False
    if first.device.type != ("cpu" if _is_interpreted() else "cuda"):
        return False
    for remainder, weight in zip(remainders, weights, strict=True):
        remainder.match(weight)
        low = remainder.rounded_off
        if type(remainder) is not kind or remainder.transposed != transposed or weight.dtype != first.dtype:
            return False
        if not _is_plain(weight, first) or (low is not None and not _is_plain(low, first)):
            return False
    return True


def _is_plain(tensor: Tensor, like: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device == like.device
        and tensor.is_contiguous()
        and tensor.data_ptr() % _ALIGNMENT == 0
    )


def _is_interpreted() -> bool:
    """Whether Triton runs kernels in Python, on the CPU's tensors, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _launch(
    remainders: Sequence[DenseRemainder],
    weights: Sequence[Tensor],
    lora_B: Float[Tensor, "layers m r"],
    lora_A: Float[Tensor, "layers r n"],
    coefficients: Float[Tensor, "layers r"],
) -> None:
    from scalora.rescale.triton_kernels import merge_kernel

    first, remainder = weights[0], remainders[0]
    rows, columns = first.shape
    left, right = (lora_A.mT, lora_B) if remainder.transposed else (lora_B, lora_A.mT)
    rank, rounding = left.shape[-1], Rounding.of(remainder, first.dtype)
    plan = plan_of(rows, columns, rank, len(weights), first.dtype, rounding)
    arguments: dict[str, Any] = {
        "DTYPE": str(first.dtype).removeprefix("torch."),
        "ROUNDING": rounding.by,
        "BITS": rounding.bits,
        "RANK": rank,
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "BLOCK_K": plan.block_k,
        "TILES": plan.tiles,
        "PRECISION": _precision(first.device),
        "num_warps": plan.warps,
        "num_stages": 1,
        # Roundings as in PyTorch's operations; the product has its own fused multiply-adds.
        "enable_fp_fusion": False,
    }
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        merge_kernel[plan.grid](
            _table(first.device, tuple(map(_entry, remainders, weights))),
            left,
            right,
            coefficients.float().contiguous(),
            on_device(remainder.step, first.device) if isinstance(remainder, StochasticRemainder) else None,
            remainder.first_row,
            rows,
            columns,
            *left.stride(),
            *right.stride(),
            **arguments,
        )


def _entry(remainder: DenseRemainder, weight: Tensor) -> tuple[int, int, int]:
    low = remainder.rounded_off
    key = remainder.name_hash if isinstance(remainder, StochasticRemainder) else 0
    return weight.data_ptr(), 0 if low is None else low.data_ptr(), key


@lru_cache(maxsize=_TABLES)
def _table(device: torch.device, entries: tuple[tuple[int, int, int], ...]) -> Int[Tensor, "layers 3"]:
    """The entries on the device, without waiting for it. Those of a model stay the same, and are sent once."""
    on_gpu = device.type == "cuda"
    return torch.tensor(entries, dtype=torch.int64, pin_memory=on_gpu).to(device, non_blocking=on_gpu)


@cache
def _precision(device: torch.device) -> str:
    """How `tl.dot` multiplies: three products in TF32 keep float32's precision, where the tensor cores have it."""
    on_nvidia = device.type == "cuda" and torch.version.hip is None
    return "tf32x3" if on_nvidia and torch.cuda.get_device_capability(device) >= (8, 0) else "ieee"
