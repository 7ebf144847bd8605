"""FSDP2's shards: the one file that knows DTensor. Every matrix is split by rows over the processes of a group.

A rescale needs all of lora_A, which is split over the rank, its gradient, and sums over all rows. Two collectives do,
whatever the number of layers: one gathers lora_A and its gradients, one sums the inner products in float64, so that all
processes solve the same equations. No base weight is gathered: each process merges into its own rows.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from scalora.maths.scaling import Grams
from scalora.model.adapters import LoraPair, by_rank, by_shape, refuse
from scalora.model.layers import factors_of, is_distributed
from scalora.parallel.layout import Shapes, Share
from scalora.rescale.changes import Factors
from scalora.rescale.optimizers import LINEAR, MATRIX, Kind, UnsupportedOptimizerError
from scalora.rescale.quantised_state import COMPANIONS
from scalora.rescale.remainder import DenseRemainder, Remainder

# Bytes that a collective gathers at once, beyond which the layers are rescaled in several goes. They are on every
# device for the time of a rescale.
_BUCKET = 1 << 28

# PyTorch 2.13 has renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is in this process, in the same memory.

    Args:
        tensor: any tensor.
    """
    with torch.no_grad():
        part: Tensor = tensor.to_local() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]
    return part


def gathered(parts: Sequence[Tensor], totals: Sequence[int], axis: Axis) -> list[Tensor]:
    """Whole matrices, from the rows that each process has. One collective, in which all processes must take part.

    Args:
        parts: this process's rows of each matrix, of any widths.
        totals: rows of each whole matrix.
        axis: the processes that have the rows.

    Returns:
        The matrices, on the devices and in the dtypes of their parts.
    """
    dtype = parts[0].dtype
    for part in parts:
        dtype = torch.promote_types(dtype, part.dtype)
    widths = [part.shape[1] for part in parts]
    padded = [axis.chunk(total) * width for total, width in zip(totals, widths, strict=True)]
    exact = [total * width for total, width in zip(totals, widths, strict=True)]
    wholes = []
    # A sum moves every entry twice. So it is less where the rows are fewer than half of the processes.
    if axis.size * sum(padded) > 2 * sum(exact):
        flat = torch.zeros(sum(exact), dtype=dtype, device=axis.device)
        for part, total, piece in zip(parts, totals, torch.split(flat, exact), strict=True):
            piece.view(total, -1)[axis.rows(total)] = part.to(flat)
        dist.all_reduce(flat, group=axis.group)
        wholes = [piece.view(total, -1) for piece, total in zip(torch.split(flat, exact), totals, strict=True)]
    else:
        own = torch.zeros(sum(padded), dtype=dtype, device=axis.device)
        for part, piece in zip(parts, torch.split(own, padded), strict=True):
            piece[: part.numel()] = part.reshape(-1).to(own)
        flat = own.new_empty(axis.size * len(own))
        _all_gather(flat, own, group=axis.group)
        pieces = torch.split(flat.view(axis.size, -1), padded, dim=1)
        for piece, total, width in zip(pieces, totals, widths, strict=True):
            wholes.append(piece.reshape(-1, width)[:total])
    return [whole.to(part) for whole, part in zip(wholes, parts, strict=True)]


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
    return gathered([as_bytes], [tensor.shape[0]], axis)[0].view(tensor.dtype).reshape(tensor.shape)


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
    if isinstance(tree, Tensor) and is_distributed(tree):
        found = whole(tree)
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
        if (key := _key(tensor)) is not None:
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
            sample[mine] = chosen.view(_INTEGERS[chosen.element_size()]).cpu().long()
            samples.append(sample)
        flat = torch.cat(samples).to(axis.device)
        dist.all_reduce(flat, group=axis.group)
        for name, sample in zip(names, torch.split(flat.cpu(), [len(sample) for sample in samples]), strict=True):
            dtype = tensors[name].dtype
            found[name] = sample.to(_INTEGERS[dtype.itemsize]).view(dtype)
    return found


class Rows:
    """Every process has some rows of each tensor. All layers take part in every rescale, because all processes must.

    A layer without gradients in any process is left alone.

    Args:
        optimizer: the optimizer of the factors.
        kinds: how each entry of its state depends on the gradients.
        by_matrices: whether rescales are by matrices, which mix the rows of lora_A, its gradient and its moments.
    """

    def __init__(self, optimizer: Optimizer, kinds: Mapping[str, Kind], by_matrices: bool) -> None:
        self._optimizer = optimizer
        self._kinds = kinds
        self._by_matrices = by_matrices

    def taking_part(self, shapes: Shapes) -> Shapes:
        """All layers.

        Args:
            shapes: all layers.
        """
        return shapes

    def shares(self, shapes: Shapes) -> list[Share]:
        """What this process works on, with one collective.

        Args:
            shapes: the layers.
        """
        wanted = [tensor for pairs in shapes for pair in pairs for tensor in self._to_gather(pair)]
        axis = axis_of(shapes[0][0].lora_A)
        if axis is not None:
            parts = [part for _, part, _ in wanted]
            wholes = gathered(parts, [total for _, _, total in wanted], axis)
        found = {key: whole for (key, _, _), whole in zip(wanted, wholes if axis else [], strict=True)}
        return [self._share(pairs, found, axis) for pairs in shapes]

    def total(self, grams: Grams, shapes: Shapes) -> Grams:
        """The sums over all processes, with one collective.

        Args:
            grams: the sums of this process.
            shapes: the layers.
        """
        if (axis := axis_of(shapes[0][0].lora_A)) is None:
            return grams
        pairs = [pair for pairs in shapes for pair in pairs]
        present = torch.tensor([pair.has_gradients for pair in pairs], dtype=grams.left.dtype)
        sums = torch.cat([grams.left.flatten(), grams.right.flatten(), present.to(grams.left.device)])
        reduced = sums.to(axis.device)
        dist.all_reduce(reduced, group=axis.group)
        left, right, counts = torch.split(
            reduced.to(sums.device), [grams.left.numel(), grams.right.numel(), len(pairs)]
        )
        # Zero inner products have no optimum, so the layer is left alone.
        without = (counts == 0)[:, None, None]
        return Grams(
            left.view_as(grams.left).masked_fill(without, 0), right.view_as(grams.right).masked_fill(without, 0)
        )

    def _to_gather(self, pair: LoraPair) -> Iterator[tuple[tuple[int, str], Tensor, int]]:
        """What is needed whole of a layer: a key, the part that is here, and the number of rows."""
        if axis_of(pair.lora_A) is None:
            return
        yield (id(pair), "lora_A"), local(pair.lora_A), pair.r
        yield (id(pair), "grad"), _gradient(pair.lora_A), pair.r
        if self._by_matrices:
            for key, value in self._linear_state(pair.lora_A):
                yield (id(pair), f"state {key}"), local(value), pair.r
        if not _has_its_rows(pair):
            yield (id(pair), "lora_B"), local(pair.lora_B), pair.m

    def _linear_state(self, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        for key, value in self._optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and self._kinds.get(key) == LINEAR:
                yield key, value

    def _share(self, pairs: list[LoraPair], found: Mapping[tuple[int, str], Tensor], axis: Axis | None) -> Share:
        whole_A = [found.get((id(pair), "lora_A"), pair.lora_A.detach()) for pair in pairs]
        own_B = [local(pair.lora_B) for pair in pairs]
        whole_B = [found.get((id(pair), "lora_B"), own) for pair, own in zip(pairs, own_B, strict=True)]
        whole_grads = [found.get((id(pair), "grad"), _gradient(pair.lora_A)) for pair in pairs]
        first, n = pairs[0], pairs[0].n
        columns = slice(None) if axis is None else axis.rows(n)  # that this process sums
        grams = (
            own_B,
            [_gradient(pair.lora_B) for pair in pairs],
            [whole[:, columns] for whole in whole_A],
            [whole[:, columns] for whole in whole_grads],
        )
        rows_here, columns_here = _part_of_weight(first)
        factors = Factors(
            whole_A,
            whole_B,
            [local(pair.weight) for pair in pairs],
            [_local_remainder(pair) for pair in pairs],
            rows_here,
            columns_here,
        )
        state = _State()
        params_B = [state.take(self._optimizer, pair.lora_B) for pair in pairs]
        rows_of_A = slice(None) if axis is None else axis.rows(first.r)
        if axis is None or not self._by_matrices:
            params_A = [state.take(self._optimizer, pair.lora_A) for pair in pairs]
            finish = partial(self._finish, pairs, found, axis)
            return Share(grams, factors, state, params_A, params_B, rows_of_A, finish)
        for pair, whole, grad in zip(pairs, whole_A, whole_grads, strict=True):
            states = {key: found[id(pair), f"state {key}"] for key, _ in self._linear_state(pair.lora_A)}
            others = {k: v for k, v in self._optimizer.state.get(pair.lora_A, {}).items() if k not in states}
            whole.grad = grad
            state.state[whole] = {key: local_state(value) for key, value in others.items()} | states
        finish = partial(self._finish, pairs, found, axis)
        return Share(grams, factors, state, whole_A, params_B, slice(None), finish)

    def _finish(self, pairs: list[LoraPair], found: Mapping[tuple[int, str], Tensor], axis: Axis | None) -> None:
        """Copy the rows that are here of what has been changed as a whole, back to where they came from."""
        for pair in pairs:
            if isinstance(pair.remainder, DenseRemainder):
                pair.remainder.changed = True
            if axis is None:
                continue
            changed = [("lora_A", local(pair.lora_A), pair.r)]
            if self._by_matrices:
                changed += [(f"state {key}", local(value), pair.r) for key, value in self._linear_state(pair.lora_A)]
                if pair.lora_A.grad is not None:
                    changed.append(("grad", local(pair.lora_A.grad), pair.r))
            if (id(pair), "lora_B") in found:
                changed.append(("lora_B", local(pair.lora_B), pair.m))
            for key, part, total in changed:
                part.copy_(found[id(pair), key][axis.rows(total)])


class _State:
    """The state of plain parameters, as an optimizer holds it."""

    def __init__(self) -> None:
        self.state: dict[Tensor, dict[str, Any]] = {}

    def take(self, optimizer: Optimizer, parameter: nn.Parameter) -> Tensor:
        """The part of a parameter that is here, with its gradient, and its state in here."""
        part = local(parameter).detach()
        part.grad = None if parameter.grad is None else local(parameter.grad)
        self.state[part] = {key: local_state(value) for key, value in optimizer.state.get(parameter, {}).items()}
        return part


def local_state(value: Any) -> Any:
    """The part of an entry of an optimizer's state that is here.

    Args:
        value: a tensor, or anything else.
    """
    return local(value) if isinstance(value, Tensor) else value


def groups_of_shards(pairs: list[LoraPair]) -> list[Shapes]:
    """The layers that are rescaled together: with one rank, on the same processes, and not too many bytes.

    Args:
        pairs: the LoRA pairs of one model, with remainders.
    """
    groups = []
    for of_rank in by_rank(pairs):
        by_axis: dict[Any, list[LoraPair]] = defaultdict(list)
        for pair in of_rank:
            by_axis[_key(pair.lora_A)].append(pair)
        for of_axis in by_axis.values():
            alike: dict[Any, list[LoraPair]] = defaultdict(list)
            for pair in of_axis:
                alike[pair.transposed, _key(pair.weight), type(pair.remainder)].append(pair)
            shapes = [shape for some in alike.values() for shape in by_shape(some)]
            groups += _in_buckets(shapes)
    return groups


def check_shards(pairs: list[LoraPair]) -> None:
    """Check that tensors are sharded as FSDP2 shards them, and as few ways as are supported.

    Args:
        pairs: the LoRA pairs of one model.

    Raises:
        UnsupportedLayerError: they are sharded in another way; the message names the module.
    """
    for pair in pairs:
        tensors = {"base weight": pair.weight, "lora_A": pair.lora_A, "lora_B": pair.lora_B}
        for key, tensor in tensors.items():
            if is_distributed(tensor) and (placements := _unknown_placements(tensor)):
                refuse(
                    pair.name,
                    f"its {key} is split as {placements}, as by tensor parallelism",
                    "shard by rows, with fully_shard() (FSDP2), or train with DistributedDataParallel",
                )
        if _key(pair.lora_A) != _key(pair.lora_B):
            refuse(
                pair.name,
                "of lora_A and lora_B one is split and the other not, or over other processes, as by tensor "
                "parallelism",
                "shard with fully_shard() (FSDP2), or train with DistributedDataParallel",
            )


def keep_rounding_errors_with_weights(pairs: list[LoraPair]) -> None:
    """Split what dense remainders keep beside weights as the weights are, also if these have been sharded since.

    It is left out of state dicts, because no backend sends int16: `scalora.saving.state` has it.

    Args:
        pairs: the LoRA pairs of one model, with remainders.
    """
    for pair in pairs:
        remainder = pair.remainder
        if is_distributed(pair.weight) and isinstance(remainder, DenseRemainder) and remainder.rounded_off is not None:
            low = split_as(remainder.rounded_off, pair.weight)
            remainder.register_buffer("rounded_off", low, persistent=False)


def check_optimizer_of_shards(pairs: list[LoraPair], optimizer: Optimizer, kinds: Mapping[str, Kind]) -> None:
    """Check that an optimizer's state can be carried over where factors are split.

    Args:
        pairs: the LoRA pairs of one model.
        optimizer: the optimizer of their factors.
        kinds: how each entry of its state depends on the gradients.

    Raises:
        UnsupportedOptimizerError: it can't.
    """
    if any(key in COMPANIONS for key in kinds) and any(pair.is_sharded for pair in pairs):
        raise UnsupportedOptimizerError(
            f"optimizer {type(optimizer).__name__} keeps its state in blocks of entries, which shards cut up: with "
            "FSDP2 use torch.optim.AdamW, or train with DistributedDataParallel"
        )


def with_their_shards(pairs: list[LoraPair]) -> list[LoraPair]:
    """The pairs with the shards that have taken the places of their parameters.

    Args:
        pairs: the LoRA pairs of one model, found before it was sharded or after.
    """
    current = []
    for pair in pairs:
        lora_A, lora_B = factors_of(pair.layer, pair.adapter)
        new = is_distributed(lora_A) and lora_A is not pair.lora_A
        current.append(replace(pair, lora_A=lora_A, lora_B=lora_B) if new else pair)
    return current


def check_not_sharded_since(pairs: list[LoraPair]) -> None:
    """Check that layers still have the parameters that they had when ScaLoRA was attached.

    Args:
        pairs: the LoRA pairs of one model.

    Raises:
        UnsupportedLayerError: they have been sharded since.
    """
    for pair in pairs:
        if not is_distributed(pair.lora_A) and is_distributed(factors_of(pair.layer, pair.adapter)[0]):
            refuse(
                pair.name,
                "it has been sharded since ScaLoRA was attached, whose parameters are no longer trained",
                "attach ScaLoRA after fully_shard() or accelerator.prepare()",
            )


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


def _in_buckets(shapes: Shapes) -> list[Shapes]:
    """Layers in lists of at most `_BUCKET` bytes that are gathered."""
    buckets: list[Shapes] = [[]]
    space = _BUCKET
    for pairs in shapes:
        size = 2 * pairs[0].lora_A.element_size() * pairs[0].lora_A.numel()
        rest = pairs
        while rest:
            if space < size and buckets[-1]:
                buckets.append([])
                space = _BUCKET
            fit = max(1, space // size)
            buckets[-1].append(rest[:fit])
            space -= size * len(rest[:fit])
            rest = rest[fit:]
    return buckets


def _sharded_dim(tensor: Tensor) -> int | None:
    """The dimension of a tensor's mesh over which its rows are split; None if they are not."""
    if not is_distributed(tensor):
        return None
    placements = tensor.placements  # type: ignore[attr-defined]
    return next((dim for dim, placement in enumerate(placements) if placement.is_shard()), None)


def _unknown_placements(tensor: Tensor) -> str | None:
    """A tensor's placements if they are not replicas of one split by rows."""
    from torch.distributed.tensor import Replicate, Shard

    placements: Any = tensor.placements  # type: ignore[attr-defined]
    split = [placement for placement in placements if not isinstance(placement, Replicate)]
    known = len(split) <= 1 and all(type(placement) is Shard and placement.dim == 0 for placement in split)
    return None if known else str(tuple(placements))


def _key(tensor: Tensor) -> Any:
    """Identifies the processes that a tensor is split over."""
    dim = _sharded_dim(tensor)
    return None if dim is None else (tensor.device_mesh, dim)  # type: ignore[attr-defined]


def _gradient(parameter: nn.Parameter) -> Tensor:
    """The part of a gradient that is here; zeros if there is none."""
    return torch.zeros_like(local(parameter)) if parameter.grad is None else local(parameter.grad)


def _has_its_rows(pair: LoraPair) -> bool:
    """Whether a process has the rows of lora_B that belong to its rows of the weight."""
    upright = isinstance(pair.remainder, DenseRemainder) and not pair.transposed
    return _key(pair.lora_B) is None or (upright and _key(pair.weight) == _key(pair.lora_B))


def _part_of_weight(pair: LoraPair) -> tuple[slice, slice]:
    """Which rows and columns of W are here, of those that `Rows` has of lora_B and lora_A."""
    everything = slice(None)
    axis = axis_of(pair.weight)
    if axis is None or not isinstance(pair.remainder, DenseRemainder):
        return everything, everything
    if pair.transposed:
        return everything, axis.rows(pair.n)
    here = axis.rows(pair.m)
    return (everything if _key(pair.lora_B) == _key(pair.weight) else here), everything


def _local_remainder(pair: LoraPair) -> Remainder:
    """The remainder of the part of the weight that is here."""
    remainder, axis = pair.remainder, axis_of(pair.weight)
    if axis is None or not isinstance(remainder, DenseRemainder):
        return remainder
    remainder.match(pair.weight)
    low = remainder.rounded_off
    return remainder.of_part(None if low is None else local(low), axis.rows(pair.weight.shape[0]).start)
