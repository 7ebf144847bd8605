"""FSDP2's shards: the one file that knows DTensor. Every tensor is split by rows over the processes of a group."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from scalora.model.layers import is_distributed
from scalora.parallel.traffic import of_gather
from scalora.rescale.optimizers import MATRIX, Kind

# PyTorch 2.13 has renamed it.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Gathers equal parts of all processes into one tensor."""

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Dtypes for the bits of others, by their bytes."""


@runtime_checkable
class Divided(Protocol):
    """A tensor that is divided over processes in another way than as a DTensor."""

    def whole(self) -> Tensor:
        """All of the tensor, with one collective, in which all processes must take part."""


class Axis(NamedTuple):
    """The processes that a tensor is split over.

    Attributes:
        group: their group.
        size: how many there are.
        place: which of them this process is, from 0.
        device: where the group's backend takes tensors from.
    """

    group: Any
    size: int
    place: int
    device: torch.device

    def rows(self, total: int) -> slice:
        """The rows of this process, as `torch.chunk` divides them: the last chunk is smaller, or empty.

        Args:
            total: rows of the whole tensor.
        """
        chunk = self.chunk(total)
        return slice(min(self.place * chunk, total), min((self.place + 1) * chunk, total))

    def chunk(self, total: int) -> int:
        """Rows of the first process.

        Args:
            total: rows of the whole tensor.
        """
        return -(-total // self.size)


def axis_of(tensor: Tensor) -> Axis | None:
    """The processes that a tensor is split over; None if all of it is here.

    Args:
        tensor: any tensor.
    """
    if (dim := _sharded_dim(tensor)) is None:
        return None
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    here = torch.device(mesh.device_type)
    if here.type != "cpu":
        here = torch.device(here.type, torch.get_device_module(here).current_device())
    return Axis(mesh.get_group(dim), mesh.size(dim), mesh.get_local_rank(dim), here)


def axis_key(tensor: Tensor) -> Any:
    """Identifies the processes that a tensor is split over; None if all of it is here.

    Args:
        tensor: any tensor.
    """
    dim = _sharded_dim(tensor)
    return None if dim is None else (tensor.device_mesh, dim)  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is in this process, in the same memory.

    Args:
        tensor: any tensor.
    """
    with torch.no_grad():
        part: Tensor = tensor.to_local() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]
    return part


def gathering(
    parts: Sequence[Tensor], totals: Sequence[int], axis: Axis, limit: int | None = None
) -> Callable[[], list[Tensor]]:
    """Start to gather whole matrices, from the rows that each process has.

    It is one collective, in which all processes must take part, and which other work may overlap.

    Args:
        parts: this process's rows of each matrix, of any widths. They may be changed afterwards.
        totals: rows of each whole matrix.
        axis: the processes that have the rows.
        limit: entries of a padded gather above which a sum takes its place, as in `of_gather`.

    Returns:
        Waits for the matrices, and returns them on the devices and in the dtypes of their parts. To be called once.
    """
    dtype = parts[0].dtype
    for part in parts:
        dtype = torch.promote_types(dtype, part.dtype)
    widths = [part.shape[1] for part in parts]
    padded = [axis.chunk(total) * width for total, width in zip(totals, widths, strict=True)]
    exact = [total * width for total, width in zip(totals, widths, strict=True)]
    by_sum, _ = of_gather(axis.size, list(zip(totals, widths, strict=True)), limit)
    if by_sum:
        flat = torch.zeros(sum(exact), dtype=dtype, device=axis.device)
        wholes = [piece.view(total, -1) for piece, total in zip(torch.split(flat, exact), totals, strict=True)]
        copy_all([whole[axis.rows(total)] for whole, total in zip(wholes, totals, strict=True)], parts)
        work = dist.all_reduce(flat, group=axis.group, async_op=True)
    else:
        own = torch.zeros(sum(padded), dtype=dtype, device=axis.device)
        places = zip(torch.split(own, padded), parts, strict=True)
        copy_all([piece[: part.numel()].view(part.shape) for piece, part in places], parts)
        flat = own.new_empty(axis.size * len(own))
        work = all_gather(flat, own, group=axis.group, async_op=True)

    def arrived() -> list[Tensor]:
        work.wait()
        if by_sum:
            found = wholes
        else:
            pieces = torch.split(flat.view(axis.size, -1), padded, dim=1)
            sizes = zip(pieces, totals, widths, strict=True)
            found = [piece.reshape(-1, width)[:total] for piece, total, width in sizes]
        return [whole.to(part) for whole, part in zip(found, parts, strict=True)]

    return arrived


def copy_all(to: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    """Copy tensors, in one operation if they are on one device.

    Args:
        to: the tensors to overwrite; some may be empty.
        parts: tensors of their shapes.
    """
    full = [(target, part) for target, part in zip(to, parts, strict=True) if part.numel()]
    if full:
        targets, sources = zip(*full, strict=True)
        torch._foreach_copy_(list(targets), list(sources))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, with one collective if it is split, in which all processes must take part.

    Args:
        tensor: any tensor.
    """
    part, axis = local(tensor).detach(), axis_of(tensor)
    if axis is None:
        return part
    # As bytes, because no backend sends int16.
    as_bytes = part.reshape(len(part), tensor.numel() // tensor.shape[0]).contiguous().view(torch.uint8)
    return gathering([as_bytes], [tensor.shape[0]], axis)()[0].view(tensor.dtype).reshape(tensor.shape)


def wholes_for(tree: Any, keep: bool) -> Any:
    """A tree of dicts, lists and tensors with whole tensors on the CPU, gathered one by one in all processes.

    Args:
        tree: the tree, the same in all processes but for what their tensors hold; not modified.
        keep: whether this process gets the tensors. The others get None in their places.
    """
    if isinstance(tree, Mapping):
        return {key: wholes_for(value, keep) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(wholes_for(value, keep) for value in tree)
    if isinstance(tree, Divided) or (isinstance(tree, Tensor) and is_distributed(tree)):
        found = tree.whole() if isinstance(tree, Divided) else whole(tree)
        return found.cpu() if keep else None
    return tree


@torch.no_grad()
def split_as(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as shards, without communication; the tensor itself if nothing is to be split.

    Args:
        value: a tensor of the whole shape, the same in all processes.
        like: a tensor of this shape.
    """
    if not is_distributed(like) or is_distributed(value):
        return value
    axis = axis_of(like)
    split = torch.empty_like(like, dtype=value.dtype, requires_grad=False)
    local(split).copy_(value if axis is None else value[axis.rows(len(value))])
    return split


def state_split_as(state: Any, optimizer: Optimizer, kinds: Mapping[str, Kind]) -> Any:
    """An optimizer's state dict with whole tensors, as one with shards.

    Args:
        state: what `Optimizer.state_dict` returns.
        optimizer: an optimizer with the same parameters, which may be split.
        kinds: how each entry of its state depends on the gradients.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(map(is_distributed, parameters)):
        return state
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    split = dict(state["state"])
    for number, parameter in zip(numbers, parameters, strict=True):
        split[number] = {
            key: split_as(value, parameter)
            if isinstance(value, Tensor) and value.shape == parameter.shape and kinds.get(key) != MATRIX
            else value
            for key, value in split.get(number, {}).items()
        }
    return {**state, "state": {number: entries for number, entries in split.items() if entries}}


@torch.no_grad()
def sampled(tensors: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Evenly spaced entries of those tensors that are split, with one collective for each group of processes.

    Args:
        tensors: tensors by name, the same in all processes.
        count: how many entries of each, at most.

    Returns:
        For each tensor that is split, the entries at every so manyth place of the whole one, on the CPU.
    """
    of_axis: dict[Any, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if (key := axis_key(tensor)) is not None:
            of_axis[key].append(name)
    found = {}
    for names in of_axis.values():
        axis = axis_of(tensors[names[0]])
        assert axis is not None
        samples = []
        for name in names:
            tensor = tensors[name]
            places = torch.arange(0, tensor.numel(), max(1, tensor.numel() // count))[:count]
            width, here = tensor.numel() // tensor.shape[0], axis.rows(tensor.shape[0])
            mine = (places >= here.start * width) & (places < here.stop * width)
            part = local(tensor).reshape(-1)
            chosen = part[(places[mine] - here.start * width).to(part.device)]
            # As integers, whose sums with zeros are exact.
            sample = torch.zeros(len(places), dtype=torch.int64)
            sample[mine] = chosen.view(INTEGERS[chosen.element_size()]).cpu().long()
            samples.append(sample)
        flat = torch.cat(samples).to(axis.device)
        dist.all_reduce(flat, group=axis.group)
        for name, sample in zip(names, torch.split(flat.cpu(), [len(sample) for sample in samples]), strict=True):
            dtype = tensors[name].dtype
            found[name] = sample.to(INTEGERS[dtype.itemsize]).view(dtype)
    return found


def reshard(model: nn.Module) -> None:
    """Have FSDP2 put shards in place of whole parameters, which a forward pass without a backward pass leaves.

    Args:
        model: any model.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # imported if the model is sharded
    if fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def unusual_placements(tensor: Tensor) -> str | None:
    """A tensor's placements if they are not replicas of one split by rows; None if they are.

    Args:
        tensor: a tensor that is split or replicated.
    """
    from torch.distributed.tensor import Replicate, Shard

    placements: Any = tensor.placements  # type: ignore[attr-defined]
    split = [placement for placement in placements if not isinstance(placement, Replicate)]
    known = len(split) <= 1 and all(type(placement) is Shard and placement.dim == 0 for placement in split)
    return None if known else str(tuple(placements))


def _sharded_dim(tensor: Tensor) -> int | None:
    """The dimension of a tensor's mesh over which its rows are split; None if they are not."""
    if not is_distributed(tensor):
        return None
    placements = tensor.placements  # type: ignore[attr-defined]
    return next((dim for dim, placement in enumerate(placements) if placement.is_shard()), None)
