"""Rescales of layers whose tensors are split by rows over processes (FSDP2).

A rescale needs all of lora_A, which is split over the rank, its gradient, and sums over all rows. Two collectives do
for a bucket of layers: one gathers lora_A and its gradients, while the bucket before is merged; one sums the inner
products in float64, so that all processes solve the same equations. No base weight is gathered: each process merges
into its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from scalora.maths.scaling import Grams
from scalora.model.adapters import LoraPair
from scalora.parallel.buckets import has_its_rows
from scalora.parallel.layout import Shapes, Share, over_columns, over_rows
from scalora.parallel.shards import Axis, axis_key, axis_of, copy_all, gathering, local
from scalora.parallel.traffic import most_of_layer
from scalora.rescale.changes import Factors, Part
from scalora.rescale.optimizers import LINEAR, Kind
from scalora.rescale.remainder import DenseRemainder, Remainder


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
        self._arriving: Callable[[], dict[tuple[int, str], Tensor]] = dict

    def taking_part(self, shapes: Shapes) -> Shapes:
        """All layers.

        Args:
            shapes: all layers.
        """
        return shapes

    def begin(self, shapes: Shapes) -> None:
        """Start the one collective that brings what this process has not got.

        Args:
            shapes: the layers.
        """
        if (axis := axis_of(shapes[0][0].lora_A)) is None:
            return
        layers = [list(self._to_gather(pair)) for pairs in shapes for pair in pairs]
        limit = sum(most_of_layer([(total, part.shape[1]) for _, part, total in layer]) for layer in layers)
        keys, parts, totals = zip(*(piece for layer in layers for piece in layer), strict=True)
        arrived = gathering(parts, totals, axis, limit)
        self._arriving = lambda: dict(zip(keys, arrived(), strict=True))

    def shares(self, shapes: Shapes) -> list[Share]:
        """What this process works on, when what `begin` brings has arrived.

        Args:
            shapes: the layers.
        """
        found = self._arriving()
        self._arriving = dict  # nothing is to outlive the rescale
        axis = axis_of(shapes[0][0].lora_A)
        return [self._share(pairs, found, axis) for pairs in shapes]

    def total(self, grams: list[Grams], shapes: Shapes) -> list[Grams]:
        """The sums over all processes, with one collective.

        Args:
            grams: for the layers of each shape, the sums of this process.
            shapes: the layers.
        """
        if (axis := axis_of(shapes[0][0].lora_A)) is None:
            return grams
        pairs = [pair for pairs in shapes for pair in pairs]
        parts = [part for of_shape in grams for part in of_shape]
        present = torch.tensor([pair.has_gradients for pair in pairs], dtype=parts[0].dtype)
        sums = torch.cat([*(part.flatten() for part in parts), present.to(parts[0].device)])
        reduced = sums.to(axis.device)
        dist.all_reduce(reduced, group=axis.group)
        *wholes, counts = torch.split(reduced.to(sums.device), [*(part.numel() for part in parts), len(pairs)])
        # Zero inner products have no optimum, so the layer is left alone.
        without = torch.split((counts == 0)[:, None, None], [len(pairs) for pairs in shapes])
        summed = iter(wholes)
        return [
            Grams(*(next(summed).view_as(part).masked_fill(missing, 0) for part in of_shape))
            for of_shape, missing in zip(grams, without, strict=True)
        ]

    def _to_gather(self, pair: LoraPair) -> Iterator[tuple[tuple[int, str], Tensor, int]]:
        """What is needed whole of a layer: a key, the part that is here, and the number of rows."""
        yield (id(pair), "lora_A"), local(pair.lora_A), pair.r
        yield (id(pair), "grad"), _gradient(pair.lora_A), pair.r
        if self._by_matrices:
            for key, value in self._linear_state(pair.lora_A):
                yield (id(pair), f"state {key}"), local(value), pair.r
        if not has_its_rows(pair):
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
        weights = [local(pair.weight) for pair in pairs]
        factors = Factors(whole_A, whole_B, [Part(weights, _local_remainders(pairs), rows_here, columns_here)])
        state = _State()
        params_B = [state.take(self._optimizer, pair.lora_B) for pair in pairs]
        spread_B = partial(over_columns, params_B)
        finish = partial(self._finish, pairs, found, axis)
        if axis is None or not self._by_matrices:
            params_A = [state.take(self._optimizer, pair.lora_A) for pair in pairs]
            spread_A = partial(over_rows, params_A, slice(None) if axis is None else axis.rows(first.r))
            return Share(grams, factors, state, params_A, params_B, spread_A, spread_B, finish)
        for pair, whole, grad in zip(pairs, whole_A, whole_grads, strict=True):
            states = {key: found[id(pair), f"state {key}"] for key, _ in self._linear_state(pair.lora_A)}
            others = {k: v for k, v in self._optimizer.state.get(pair.lora_A, {}).items() if k not in states}
            whole.grad = grad
            state.state[whole] = {key: _local_state(value) for key, value in others.items()} | states
        spread_A = partial(over_rows, whole_A, slice(None))
        return Share(grams, factors, state, whole_A, params_B, spread_A, spread_B, finish)

    def _finish(self, pairs: list[LoraPair], found: Mapping[tuple[int, str], Tensor], axis: Axis | None) -> None:
        """Copy the rows that are here of what has been changed as a whole, back to where they came from."""
        changed: list[tuple[Tensor, Tensor]] = []
        for pair in pairs:
            if isinstance(pair.remainder, DenseRemainder):
                pair.remainder.changed = True
            if axis is None:
                continue
            parts: dict[str, Tensor] = {"lora_A": pair.lora_A}
            if self._by_matrices:
                parts |= {f"state {key}": value for key, value in self._linear_state(pair.lora_A)}
                if pair.lora_A.grad is not None:
                    parts["grad"] = pair.lora_A.grad
            if (id(pair), "lora_B") in found:
                parts["lora_B"] = pair.lora_B
            for key, tensor in parts.items():
                changed.append((local(tensor), found[id(pair), key][axis.rows(tensor.shape[0])]))
        copy_all([part for part, _ in changed], [rows for _, rows in changed])


class _State:
    """The state of plain parameters, as an optimizer holds it."""

    def __init__(self) -> None:
        self.state: dict[Tensor, dict[str, Any]] = {}

    def take(self, optimizer: Optimizer, parameter: nn.Parameter) -> Tensor:
        """The part of a parameter that is here, with its gradient, and its state in here."""
        part = local(parameter).detach()
        part.grad = None if parameter.grad is None else local(parameter.grad)
        self.state[part] = {key: _local_state(value) for key, value in optimizer.state.get(parameter, {}).items()}
        return part


def _local_state(value: Any) -> Any:
    """The part of an entry of an optimizer's state that is here."""
    return local(value) if isinstance(value, Tensor) else value


def _gradient(parameter: nn.Parameter) -> Tensor:
    """The part of a gradient that is here; zeros if there is none."""
    return torch.zeros_like(local(parameter)) if parameter.grad is None else local(parameter.grad)


def _part_of_weight(pair: LoraPair) -> tuple[slice, slice]:
    """Which rows and columns of W are here, of those that `Rows` has of lora_B and lora_A."""
    everything = slice(None)
    axis = axis_of(pair.weight)
    if axis is None or not isinstance(pair.remainder, DenseRemainder):
        return everything, everything
    if pair.transposed:
        return everything, axis.rows(pair.n)
    here = axis.rows(pair.m)
    return (everything if axis_key(pair.lora_B) == axis_key(pair.weight) else here), everything


def _local_remainders(pairs: list[LoraPair]) -> list[Remainder]:
    """The remainders of the part of the weights that is here, for layers of one shape."""
    axis = axis_of(pairs[0].weight)
    first_row = 0 if axis is None else axis.rows(pairs[0].weight.shape[0]).start
    remainders: list[Remainder] = []
    for pair in pairs:
        remainder = pair.remainder
        if axis is not None and isinstance(remainder, DenseRemainder):
            remainder.match(pair.weight)
            low = remainder.rounded_off
            remainder = remainder.of_part(None if low is None else local(low), first_row)
        remainders.append(remainder)
    return remainders
