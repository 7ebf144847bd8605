"""Tensors that are divided over processes by their entries: each process has a run of them (DeepSpeed's ZeRO).

A run may begin and end in the middle of a matrix's row. Knows tensors and groups of processes only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from scalora.parallel.shards import INTEGERS, Axis, all_gather, copy_all


class Cut(NamedTuple):
    """Where a tensor's entries are: on a line that is cut into stretches of equal size, one for each process.

    Attributes:
        total: number of the tensor's entries.
        size: length of a stretch.
        offset: where on the line the tensor begins.
        alone: whether nothing else is on the line. Beyond the tensor's end it is filled up then.
    """

    total: int
    size: int
    offset: int
    alone: bool

    def of(self, place: int) -> slice:
        """The entries of a process.

        Args:
            place: the process's number in its group.
        """
        start, stop = (
            min(max(edge - self.offset, 0), self.total) for edge in (place * self.size, (place + 1) * self.size)
        )
        return slice(start, stop)

    def places(self) -> range:
        """The processes that have any of the entries."""
        if not self.total:
            return range(0)
        return range(self.offset // self.size, (self.offset + self.total - 1) // self.size + 1)

    def in_bytes(self, itemsize: int) -> Cut:
        """The same cut of the tensor's bytes.

        Args:
            itemsize: bytes of an entry.
        """
        return Cut(self.total * itemsize, self.size * itemsize, self.offset * itemsize, self.alone)


@dataclass(frozen=True, eq=False)
class Run:
    """The entries that this process has of a tensor that is divided over processes.

    Attributes:
        flat: the one-dimensional tensor that they are in.
        start: where in it they begin.
        cut: which entries they are.
        axis: the processes that have the others.
        shape: the tensor's shape.
    """

    flat: Tensor
    start: int
    cut: Cut
    axis: Axis
    shape: torch.Size

    @property
    def entries(self) -> slice:
        """Which entries of the tensor are here."""
        return self.cut.of(self.axis.place)

    @property
    def values(self) -> Tensor:
        """The entries that are here, in the same memory."""
        return self.within(self.flat.detach())

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's dtype."""
        return self.flat.dtype

    def within(self, flat: Tensor) -> Tensor:
        """The run's part of another tensor that is laid out as its own, in the same memory.

        Args:
            flat: a gradient, for example, or a moment of it.
        """
        return flat.narrow(0, self.start, self.entries.stop - self.entries.start)

    def of(self, flat: Tensor) -> Run:
        """The same entries of another tensor that is laid out as this one.

        Args:
            flat: the one-dimensional tensor that they are in.
        """
        return Run(flat, self.start, self.cut, self.axis, self.shape)

    def put(self, whole: Tensor) -> None:
        """Overwrite the entries that are here.

        Args:
            whole: a tensor of the run's shape.
        """
        self.values.copy_(whole.reshape(-1)[self.entries])

    def whole(self) -> Tensor:
        """All of the tensor, with one collective, in which all processes must take part."""
        # As bytes, because no backend sends int16.
        as_bytes = self.values.contiguous().view(torch.uint8)
        (found,) = gathered([as_bytes], [self.cut.in_bytes(self.dtype.itemsize)], self.axis)
        return found.view(self.dtype).view(self.shape)


class Rectangle(NamedTuple):
    """A part of a matrix that is a run of its entries.

    Attributes:
        rows: its rows.
        columns: its columns.
        entries: which entries of the run it is.
    """

    rows: slice
    columns: slice
    entries: slice


def rectangles(entries: slice, columns: int) -> Iterator[Rectangle]:
    """The whole rows of a matrix in a run of its entries, and what it has of the rows before and after them.

    Args:
        entries: the run.
        columns: columns of the matrix.
    """
    place = entries.start
    while place < entries.stop:
        row, column = divmod(place, columns)
        whole_rows = (entries.stop - place) // columns if column == 0 else 0
        end = place + whole_rows * columns if whole_rows else min(entries.stop, (row + 1) * columns)
        width = columns if whole_rows else end - place
        here = slice(place - entries.start, end - entries.start)
        yield Rectangle(slice(row, row + max(1, whole_rows)), slice(column, column + width), here)
        place = end


@torch.no_grad()
def gathered(parts: Sequence[Tensor], cuts: Sequence[Cut], axis: Axis) -> list[Tensor]:
    """Whole tensors, flat, from the runs that each process has. One collective, in which all processes must take part.

    Args:
        parts: this process's entries of each tensor.
        cuts: which entries those are. All tensors are alone on their lines, or all on the lines of others.
        axis: the processes.

    Returns:
        The tensors, where the processes communicate, in the dtypes of their parts.
    """
    dtype = reduce(torch.promote_types, {part.dtype for part in parts})
    if cuts[0].alone:
        # Every process has as many entries of each, some of them beyond its end.
        rooms = [cut.size for cut in cuts]
        begins = list(accumulate(rooms, initial=0))
        everyones = _exchanged(parts, begins, begins[-1], dtype, axis)
        pieces = torch.split(everyones, rooms, dim=1)
        wholes = [piece.reshape(-1)[: cut.total] for piece, cut in zip(pieces, cuts, strict=True)]
    else:
        lengths = [0] * axis.size
        begins = []
        found: list[list[tuple[int, slice]]] = []
        for cut in cuts:
            begins.append(lengths[axis.place])
            found.append([])
            for place in cut.places():
                entries = cut.of(place)
                begin = lengths[place]
                lengths[place] += entries.stop - entries.start
                found[-1].append((place, slice(begin, lengths[place])))
        # A sum moves every entry twice. So it is less if one process has more than twice its share.
        if axis.size * max(lengths) > 2 * sum(lengths):
            return _summed(parts, cuts, dtype, axis)
        everyones = _exchanged(parts, begins, max(lengths), dtype, axis)
        wholes = [torch.cat([everyones[place, where] for place, where in of_one]) for of_one in found]
    return [whole.to(part.dtype) for whole, part in zip(wholes, parts, strict=True)]


def _exchanged(parts: Sequence[Tensor], begins: Sequence[int], length: int, dtype: torch.dtype, axis: Axis) -> Tensor:
    """What every process has, one after the other."""
    own = torch.zeros(length, dtype=dtype, device=axis.device)
    copy_all([own[begin : begin + len(part)] for part, begin in zip(parts, begins, strict=False)], parts)
    everyones = own.new_empty(axis.size * length)
    all_gather(everyones, own, group=axis.group)
    return everyones.view(axis.size, length)


def _summed(parts: Sequence[Tensor], cuts: Sequence[Cut], dtype: torch.dtype, axis: Axis) -> list[Tensor]:
    """Whole tensors as sums over the processes, of what is zero but where a process has entries."""
    totals = [cut.total for cut in cuts]
    flat = torch.zeros(sum(totals), dtype=dtype, device=axis.device)
    wholes = torch.split(flat, totals)
    copy_all([whole[cut.of(axis.place)] for whole, cut in zip(wholes, cuts, strict=True)], parts)
    dist.all_reduce(flat, group=axis.group)
    return [whole.to(part.dtype) for whole, part in zip(wholes, parts, strict=True)]


@torch.no_grad()
def sampled_runs(runs: dict[str, Run], count: int) -> dict[str, Tensor]:
    """Evenly spaced entries of tensors, as `scalora.parallel.shards.sampled` takes them, with one collective for all.

    Args:
        runs: this process's entries of tensors, by name, the same names in all processes.
        count: how many entries of each, at most.

    Returns:
        For each tensor the entries at every so manyth place of the whole one, on the CPU.
    """
    samples = []
    for run in runs.values():
        places = torch.arange(0, run.cut.total, max(1, run.cut.total // count))[:count]
        mine = (places >= run.entries.start) & (places < run.entries.stop)
        chosen = run.values[(places[mine] - run.entries.start).to(run.flat.device)]
        # As integers, whose sums with zeros are exact.
        sample = torch.zeros(len(places), dtype=torch.int64)
        sample[mine] = chosen.view(INTEGERS[run.dtype.itemsize]).cpu().long()
        samples.append(sample)
    axis = next(iter(runs.values())).axis
    flat = torch.cat(samples).to(axis.device)
    dist.all_reduce(flat, group=axis.group)
    parts = torch.split(flat.cpu(), [len(sample) for sample in samples])
    return {
        name: part.to(INTEGERS[run.dtype.itemsize]).view(run.dtype)
        for (name, run), part in zip(runs.items(), parts, strict=True)
    }
