"""Where rescales put the remainder ``Σ A·diag(c)·Bᵀ``, ``c = s·(1 − α⊙β)`` (paper, section 6): tensors only.

There are two places. `DenseRemainder` adds it to the base weight in place, as the paper does: this takes no time in the
forward pass and, in float32, no memory, but changes the base weight, which must not be quantised. `FactoredRemainder`
keeps it beside the unchanged base weight, as a frozen low-rank product that the forward pass adds.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from scalora.maths.lowrank import compressed_products
from scalora.rescale.rounding import join, split

HALF = (torch.bfloat16, torch.float16)
"""Half-precision dtypes: rounding every merge to them would add up, so `DenseRemainder` keeps the rounding errors."""

# Half-precision weights are merged in blocks of rows with about this many entries. This limits the float32 copy, from
# which the sum is rounded, to 64 MiB, and on a CPU to 4 MiB, so that it fits into the caches.
_BLOCK, _BLOCK_ON_CPU = 1 << 24, 1 << 20


class DenseRemainder(nn.Module):
    """Adds remainders to the base weight in place. For float32 and float64 weights, that is all.

    A bfloat16 or float16 weight that is rounded at every merge would random-walk away from the exact sum. So the
    rounding error of each entry is kept in 16 bits (`rounded_off`, 2 bytes per entry) and added back before the next
    merge: weight and error together have float32's 24 bits, and the weight is never more than one rounding away from
    their sum. For bfloat16 the 16 bits are the low half of the float32 sum (as in "Split SGD" of Intel's extension for
    PyTorch); for float16, whose exponent is shorter, they are a fraction of the rounding interval.

    Args:
        weight: the base weight, (m, n), or (n, m) if `transposed`; not quantised. Or a stack of such weights, the
            experts of a mixture, or a convolution's, (m, inputs, …): `by_matrix` then is what takes merges.
        transposed: whether the base weight is stored transposed (Conv1D, embeddings).

    Attributes:
        transposed: whether the base weight is stored transposed.
        changed: whether anything has been added, so that the base weight is no longer the original one.
        first_row: number of the first row of the stored weight that is here, if it is one process's part.
        rounded_off: the rounding error of each entry, int16 (int8 in an `EightBitRemainder`), of the weight's shape;
            None for a float32 or float64 weight.
    """

    rounded_off: Int[Tensor, ...] | None

    _KEPT: ClassVar[torch.dtype] = torch.int16

    def __init__(self, weight: Tensor, *, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.changed = False
        self.first_row = 0
        self.register_buffer("rounded_off", self._no_errors_yet(weight))

    @torch.no_grad()
    def add(self, weight: Tensor, left: Float[Tensor, "m r"], right: Float[Tensor, "n r"]) -> None:
        """Add ``left @ right.T`` to the base weight in place, without a temporary tensor of its size.

        Args:
            weight: the base weight, the same one at every call.
            left: left factor, (m, r), in the adapter's dtype.
            right: right factor, (n, r), in the adapter's dtype.
        """
        self.changed = True
        if self.transposed:
            left, right = right, left
        self.match(weight)
        if weight.dtype not in HALF:
            weight.addmm_(left.to(weight.dtype), right.to(weight.dtype).mT)
            return
        left, right = left.float(), right.float().mT
        rows = max(1, (_BLOCK_ON_CPU if weight.is_cpu else _BLOCK) // weight.shape[1])
        for start in range(0, len(weight), rows):
            part = slice(start, start + rows)
            self._add_to_rows(weight, part, left[part], right)

    def of_part(self, rounded_off: Int[Tensor, "rows columns"] | None, first_row: int) -> DenseRemainder:
        """The remainder of some rows of the weight, which shares their memory.

        Args:
            rounded_off: these rows' rounding errors.
            first_row: number of the first of them.
        """
        part = copy.copy(self)
        part._buffers = self._buffers | {"rounded_off": rounded_off}
        part.first_row = first_row
        return part

    def by_matrix(self, weight: Tensor, matrices: Sequence[Float[Tensor, "rows columns"]]) -> Sequence[DenseRemainder]:
        """The remainders of the matrices that a weight consists of, which share its memory.

        Args:
            weight: the base weight.
            matrices: views of it: those of experts, or a convolution's.
        """
        self.match(weight)
        low = self.rounded_off
        parts = [None] * len(matrices) if low is None else low.view(len(matrices), *matrices[0].shape)
        return [self.of_part(part, 0) for part in parts]

    def follow(self, parts: Sequence[DenseRemainder]) -> None:
        """Take note of what has been added to the remainders of matrices.

        Args:
            parts: what `by_matrix` has returned.
        """
        self.changed = self.changed or any(part.changed for part in parts)

    def match(self, weight: Tensor) -> None:
        """Begin to keep rounding errors, or stop, if the weight's dtype asks for it.

        It may have been changed since, by `prepare_model_for_kbit_training` for example.

        Args:
            weight: the base weight, as stored.
        """
        if (weight.dtype in HALF) != (self.rounded_off is not None):
            self.rounded_off = self._no_errors_yet(weight)

    def _no_errors_yet(self, weight: Tensor) -> Tensor | None:
        return torch.zeros_like(weight, dtype=self._KEPT) if weight.dtype in HALF else None

    def _add_to_rows(self, weight: Tensor, part: slice, left: Tensor, right: Tensor) -> None:
        """Add ``left @ right``, in float32, to some rows of a half-precision weight."""
        assert self.rounded_off is not None
        block, low = weight[part], self.rounded_off[part]
        split(join(block, low).addmm_(left, right), block, low)

    def exact(self, weight: Tensor) -> Tensor:
        """The base weight without its rounding error: in float32 for half precision, else the weight itself.

        Args:
            weight: the base weight, as stored.
        """
        return weight if self.rounded_off is None or weight.dtype not in HALF else join(weight, self.rounded_off)

    @torch.no_grad()
    def rebuild(self, exact: Tensor, weight: nn.Parameter) -> None:
        """Round an exact weight anew, after the base weight has been converted to another dtype or device.

        Args:
            exact: the weight from `exact`, before the conversion.
            weight: the converted base weight; overwritten.
        """
        self.rounded_off = self._no_errors_yet(weight)
        if self.rounded_off is None:
            weight.data.copy_(exact)
        else:
            split(exact.to(weight.device, torch.float32, copy=True), weight.data, self.rounded_off)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        key = f"{prefix}rounded_off"
        saved, own = state_dict.get(key), self.rounded_off
        # torch would convert one to the other, as if the bits were a number.
        if isinstance(saved, Tensor) and own is not None and saved.dtype != own.dtype:
            lists[-1].append(
                f"{key!r} is {saved.dtype}, but this model keeps rounding errors in {own.dtype}: set the merge "
                "('dense' or 'dense_8bit') that it was saved with"
            )
            state_dict = {name: value for name, value in state_dict.items() if name != key}
            strict = False  # it is not missing
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)


class FactoredRemainder(nn.Module):
    """Keeps the sum of the remainders as a product ``left @ right.T`` and leaves the base weight unchanged.

    Every rescale fills in columns. Once there are more than twice `max_rank`, the product is compressed to its
    `max_rank` largest singular values, from Gram matrices of its columns and without forming anything of size m × n.
    Nothing is lost of a product of lower rank. It keeps as many columns, because the host does not know its rank; but
    never more than m or n.

    The factors have their full width from the start, with zeros in the columns that are free: a compiled forward pass
    then never sees another shape, and nothing is allocated in a rescale.

    Args:
        m: rows of the base weight (out_features).
        n: columns of the base weight (in_features).
        max_rank: the most columns that a compression keeps.
        r: the most columns that are added at once: the adapter's rank.
        dtype: dtype of the factors, the adapter's: float32 or float64.
        device: device of the factors, the adapter's.
        experts: number of products, each of which is compressed by itself: a mixture's experts. With more than one,
            all tensors have a first dimension for them.

    Attributes:
        max_rank: the most columns that a compression keeps.
        columns: number of columns that are in use.
        changed: whether there are any, so that the adapter alone is not the whole update. Compiled forward passes
            depend on this and not on the number, which changes with every rescale.
        left: left factor, (m, 2·max_rank + r).
        right: right factor, (n, 2·max_rank + r).
        discarded: sum over all compressions of the squared Frobenius norm of what they left out.
    """

    left: Float[Tensor, "*experts m k"]
    right: Float[Tensor, "*experts n k"]
    discarded: Float[Tensor, "*experts"]

    def __init__(
        self, m: int, n: int, max_rank: int, r: int, *, dtype: torch.dtype, device: torch.device, experts: int = 1
    ) -> None:
        super().__init__()
        self.max_rank = max_rank
        self.columns = 0
        self.changed = False
        self._added = r
        stack = () if experts == 1 else (experts,)
        # Column by column in memory, so that the columns in use are one piece of it.
        for name, rows in (("left", m), ("right", n)):
            self.register_buffer(name, torch.zeros(*stack, 2 * max_rank + r, rows, dtype=dtype, device=device).mT)
        self.register_buffer("discarded", torch.zeros(stack, dtype=dtype, device=device))

    @property
    def used(self) -> tuple[Float[Tensor, "*experts m c"], Float[Tensor, "*experts n c"]]:
        """The columns of `left` and `right` that are in use, as views."""
        return self.left[..., : self.columns], self.right[..., : self.columns]

    @property
    def nonzero(self) -> tuple[Float[Tensor, "*experts m c"], Float[Tensor, "*experts n c"]]:
        """The columns in use without those that add nothing to any product. Waits for the device."""
        left, right = self.used
        adds = left.any(-2) & right.any(-2)
        adds = adds.any(0) if adds.ndim == 2 else adds
        return left[..., adds], right[..., adds]

    @property
    def products(self) -> list[tuple[Float[Tensor, "m c"], Float[Tensor, "n c"]]]:
        """The columns of each product that are in use, as views: one product, or one of each expert."""
        left, right = map(_matrices, self.used)
        return list(zip(left, right, strict=True))

    def by_matrix(self, weight: Tensor, matrices: Sequence[Tensor]) -> Sequence[FactoredRemainder]:
        """The remainders of the experts, which share the memory of this one.

        Args:
            weight: not used. It is here for a common signature with `DenseRemainder.by_matrix`.
            matrices: not used.
        """
        if self.left.ndim == 2:
            return [self]
        experts = [copy.copy(self) for _ in self.left]
        for expert, left, right, discarded in zip(experts, self.left, self.right, self.discarded, strict=True):
            expert._buffers = {"left": left, "right": right, "discarded": discarded}
        return experts

    def follow(self, parts: Sequence[FactoredRemainder]) -> None:
        """Take note of what has been added to the remainders of experts, as many columns to each.

        Args:
            parts: what `by_matrix` has returned.
        """
        self.columns, self.changed = parts[0].columns, parts[0].changed

    @torch.no_grad()
    def resize(self, max_rank: int) -> None:
        """Set `max_rank`. Columns that are in use stay as they are.

        Args:
            max_rank: the most columns that a compression keeps.
        """
        self.max_rank = max_rank
        if self.left.shape[-1] != 2 * max_rank + self._added:
            self._replace(*self.used)

    @contextmanager
    def replaced(self, left: Float[Tensor, "m c"], right: Float[Tensor, "n c"]) -> Iterator[None]:
        """Context manager in which the product is another one.

        Args:
            left: its left factor, (m, c).
            right: its right factor, (n, c).
        """
        before = (self.left, self.right, self.columns, self.changed)
        self.left, self.right, self.columns, self.changed = left, right, left.shape[1], True
        try:
            yield
        finally:
            self.left, self.right, self.columns, self.changed = before

    @torch.no_grad()
    def clear(self) -> None:
        """Set the product to zero."""
        for buffer in (self.left, self.right, self.discarded):
            buffer.zero_()
        self.columns, self.changed = 0, False

    @torch.no_grad()
    def add(self, weight: Tensor, left: Float[Tensor, "m r"], right: Float[Tensor, "n r"]) -> None:
        """Add ``left @ right.T`` to the product, and compress it if it has become too wide.

        Args:
            weight: the base weight; not used. It is here for a common signature with `DenseRemainder.add`.
            left: left factor, (m, r), in the adapter's dtype.
            right: right factor, (n, r), in the adapter's dtype.
        """
        self.append(left, right)
        if self.is_full:
            compress([self])

    def append(self, left: Float[Tensor, "*experts m r"], right: Float[Tensor, "*experts n r"]) -> None:
        """Add ``left @ right.T`` to the product by filling in columns, without compressing it.

        Args:
            left: left factor, (m, r), in the adapter's dtype.
            right: right factor, (n, r), in the adapter's dtype.
        """
        self.make_room(left.shape[-1])
        for columns, factor in zip(self.last(left.shape[-1]), (left, right), strict=True):
            columns.copy_(factor)

    def make_room(self, count: int) -> None:
        """Put free columns, which are zero, to use.

        Args:
            count: how many.
        """
        self.columns, self.changed = self.columns + count, True

    def last(self, count: int) -> tuple[Float[Tensor, "*experts m r"], Float[Tensor, "*experts n r"]]:
        """The last columns of `left` and `right` that are in use, as views.

        Args:
            count: how many.
        """
        start = self.columns - count
        return self.left[..., start : self.columns], self.right[..., start : self.columns]

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply the product by a number.

        Args:
            factor: the number.
        """
        self.used[0].mul_(factor)

    @property
    def is_full(self) -> bool:
        """Whether more than twice `max_rank` columns are in use, so that the product should be compressed."""
        return self.columns > 2 * self.max_rank

    def energy(self) -> Float[Tensor, ""]:
        """Squared Frobenius norm of the product, or of all experts' together, from k × k Gram matrices."""
        left, right = self.used
        return ((left.mT @ left) * (right.mT @ right)).sum()

    def dense(self) -> Float[Tensor, "*experts m n"]:
        """The product itself, (m, n); of experts (E, m, n)."""
        left, right = self.used
        return left @ right.mT

    def _replace(self, left: Float[Tensor, "*experts m c"], right: Float[Tensor, "*experts n c"]) -> None:
        """Put other columns in place of those in use, in the buffers if these are as wide as they should be."""
        columns = left.shape[-1]
        width = max(2 * self.max_rank + self._added, columns)
        for name, used in (("left", left), ("right", right)):
            buffer = getattr(self, name)
            if buffer.shape[-1] != width:
                buffer = buffer.new_empty(*buffer.shape[:-2], width, buffer.shape[-2]).mT
                setattr(self, name, buffer)
            buffer[..., :columns] = used
            buffer[..., columns:] = 0
        self.columns, self.changed = columns, columns > 0

    def _apply(self, fn: Any, recurse: bool = True) -> FactoredRemainder:
        # Rescales add to the sum for the whole of a run: a conversion of the model to half precision leaves it alone.
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dtype in HALF:
                setattr(self, name, before[name].to(buffer.device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Copies: safetensors, with which Accelerate saves, does not take a part of a larger piece of memory.
        for name in ("left", "right"):
            used = destination[prefix + name][..., : self.columns]
            destination[prefix + name] = used.clone(memory_format=torch.contiguous_format)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        left, right = (state_dict.get(prefix + name) for name in ("left", "right"))
        if (
            isinstance(left, Tensor)
            and isinstance(right, Tensor)
            and left.shape[:-1] == self.left.shape[:-1]
            and right.shape[:-1] == self.right.shape[:-1]
            and left.shape[-1] == right.shape[-1]
        ):
            with torch.no_grad():
                self._replace(left, right)
            # The buffers hold them now, at another width than a state's: torch compares shapes.
            state_dict |= {prefix + name: getattr(self, name) for name in ("left", "right")}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


Remainder = DenseRemainder | FactoredRemainder
"""A layer's remainder, of either kind."""

REMAINDER_BUFFERS = ("rounded_off", "left", "right", "discarded")
"""The names of the buffers of both kinds of remainder."""


@torch.no_grad()
def add_to_all(
    remainders: Sequence[Remainder],
    weights: Sequence[Tensor],
    lefts: Float[Tensor, "layers m r"],
    rights: Float[Tensor, "layers n r"],
) -> None:
    """Add ``left @ right.T`` to the remainder of each layer; to a factored one in the last columns that are in use.

    Args:
        remainders: the remainders of layers of one shape, all of one kind; factored ones after `make_room`.
        weights: the base weight of each layer.
        lefts: the left factors, in the adapter's dtype.
        rights: the right factors, in the adapter's dtype.
    """
    factored = [remainder for remainder in remainders if isinstance(remainder, FactoredRemainder)]
    if factored:
        free = [remainder.last(lefts.shape[-1]) for remainder in factored]
        # Laid out as in the buffers, so that one operation copies for all layers.
        for columns, factors in zip(zip(*free, strict=True), (lefts, rights), strict=True):
            torch._foreach_copy_([of_layer.mT for of_layer in columns], list(factors.mT.contiguous()))
        return
    for remainder, weight, left, right in zip(remainders, weights, lefts, rights, strict=True):
        remainder.add(weight, left, right)


def _matrices(stack: Float[Tensor, "*experts rows columns"]) -> Sequence[Float[Tensor, "rows columns"]]:
    return list(stack) if stack.ndim == 3 else [stack]


@torch.no_grad()
def compress_full(remainders: Iterable[Remainder]) -> None:
    """Compress those remainders that are factored and full.

    Args:
        remainders: the remainders, of any kinds, shapes and devices.
    """
    compress([r for r in remainders if isinstance(r, FactoredRemainder) and r.is_full])


@torch.no_grad()
def compress(remainders: Sequence[FactoredRemainder]) -> None:
    """Reduce factored remainders to their largest singular values, with both factors of equal norm.

    Nothing waits for the device: how many columns remain depends on `max_rank` and the shape alone.

    Args:
        remainders: the remainders, of any shapes; those with equal numbers of columns are compressed together.
    """
    alike = defaultdict(list)
    for remainder in remainders:
        rank = min(remainder.max_rank, remainder.columns, remainder.left.shape[-2], remainder.right.shape[-2])
        alike[remainder.left.device, remainder.columns, rank].append(remainder)
    for (_, _, rank), group in alike.items():
        used = [product for remainder in group for product in remainder.products]
        smaller, discarded = compressed_products(used, rank)
        stacks = [map(_matrices, (remainder.left.mT, remainder.right.mT)) for remainder in group]
        buffers = [buffer for left, right in stacks for both in zip(left, right, strict=True) for buffer in both]
        torch._foreach_copy_([buffer[:rank] for buffer in buffers], [new.mT for pair in smaller for new in pair])
        torch._foreach_zero_([buffer[rank:] for buffer in buffers])
        of_all = [of_product for remainder in group for of_product in remainder.discarded.view(-1)]
        torch._foreach_add_(of_all, list(discarded.to(of_all[0].dtype)))
        for remainder in group:
            remainder.columns = rank
            remainder.resize(remainder.max_rank)


def scale_columns(
    A: Float[Tensor, "*layers m r"], B: Float[Tensor, "*layers n r"], coefficients: Float[Tensor, "*layers r"]
) -> tuple[Float[Tensor, "*layers m r"], Float[Tensor, "*layers n r"]]:
    """The factors ``A·diag(coefficients)`` and B of what a rescale moves into the remainder.

    Args:
        A: PEFT's ``lora_B.weight``, (…, m, r).
        B: PEFT's ``lora_A.weight`` transposed, (…, n, r).
        coefficients: ``s·(1 − α⊙β)``, (…, r). Where one is exactly 0, the column becomes exactly 0 in both factors,
            even if A or B has NaN or infinite entries there.

    Returns:
        The two factors, (…, m, r) and (…, n, r).
    """
    coefficients = coefficients[..., None, :]
    left = torch.where(coefficients == 0, 0, A * coefficients.to(A.dtype))
    return left, torch.where(coefficients == 0, 0, B)
