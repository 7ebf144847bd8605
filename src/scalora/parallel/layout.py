"""Which part of each layer's tensors is in this process, so that a rescale gets plain tensors: the seam.

`Whole`: all of them, as with one process or DistributedDataParallel. `scalora.parallel.stacks.Stacks`: all of them, for
layers that are not one matrix, as the experts of a mixture. `scalora.parallel.rows.Rows`: some rows of each, as with
FSDP2. `scalora.parallel.runs.Runs`: some entries of each, as with DeepSpeed's ZeRO. The mathematics and the kernels see
tensors without knowing which part of a matrix they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import groupby
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from scalora.maths.scaling import Grams
from scalora.model.adapters import LoraPair, by_rank, by_shape, in_chunks, rank_key
from scalora.parallel.zero import Zero
from scalora.rescale.changes import Factors, Part
from scalora.rescale.kernels import Kernels
from scalora.rescale.optimizers import Kind
from scalora.rescale.transport import HoldsState, gradients_of

Shapes = list[list[LoraPair]]
"""Layers that are rescaled together, in lists of equal shapes."""

Spread = Callable[[Kernels, Float[Tensor, "layers r"]], list[Tensor]]
"""Brings a factor of each of the layers' r columns into the shapes of the tensors that are multiplied by them."""


class Share(NamedTuple):
    """What this process works on in a rescale of layers of one shape: plain tensors.

    Lists have an entry for each layer, or for each expert of each layer.

    Attributes:
        grams: lora_B, their gradients, lora_A, their gradients: what this process sums to inner products.
        factors: what a change is applied to, and the part of the weights that is here.
        optimizer: the optimizer, or what holds its state of `lora_A` and `lora_B`.
        lora_A: the layers' lora_A whose gradients and state are transported.
        lora_B: the same of lora_B.
        spread_A: brings α into the shapes of `lora_A`, row by row.
        spread_B: brings β into the shapes of `lora_B`, column by column.
        finish: takes the changes back to where the tensors came from. To be called last.
    """

    grams: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
    factors: Factors
    optimizer: HoldsState
    lora_A: list[Tensor]
    lora_B: list[Tensor]
    spread_A: Spread
    spread_B: Spread
    finish: Callable[[], None]


@runtime_checkable
class Layout(Protocol):
    """Where the tensors of layers are that are rescaled together."""

    def taking_part(self, shapes: Shapes) -> Shapes:
        """The layers that take part in this rescale.

        Args:
            shapes: all layers.
        """

    def begin(self, shapes: Shapes) -> None:
        """Start to bring what this process has not got, without waiting for it.

        Args:
            shapes: the layers that take part.
        """

    def shares(self, shapes: Shapes) -> list[Share]:
        """What this process works on, for the layers of each shape, after `begin`.

        Args:
            shapes: the layers that take part.
        """

    def total(self, grams: list[Grams], shapes: Shapes) -> list[Grams]:
        """The layers' inner products, from what this process has summed.

        Args:
            grams: for the layers of each shape, the sums of this process.
            shapes: the layers that take part.
        """


class Whole:
    """Every process has everything. Layers without gradients take no part.

    Args:
        optimizer: the optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    def taking_part(self, shapes: Shapes) -> Shapes:
        """The layers that have gradients.

        Args:
            shapes: all layers.
        """
        return list(filter(None, ([pair for pair in pairs if pair.has_gradients] for pairs in shapes)))

    def begin(self, shapes: Shapes) -> None:
        """Everything is here.

        Args:
            shapes: not used.
        """

    def tensors_of(self, shapes: Shapes) -> list[Tensor]:
        """All tensors on the layers' devices that a rescale reads or changes, besides gradients.

        Args:
            shapes: the layers that take part.
        """
        tensors: list[Tensor] = []
        state_of = self._optimizer.state.get
        for pair in (pair for pairs in shapes for pair in pairs):
            tensors += (pair.lora_A, pair.lora_B, pair.weight)
            tensors += [buffer for buffer in pair.remainder._buffers.values() if buffer is not None]
            for factor in (pair.lora_A, pair.lora_B):
                # Counts of steps are on the CPU.
                device = factor.device
                tensors += [t for t in state_of(factor, {}).values() if isinstance(t, Tensor) and t.device == device]
        return tensors

    def shares(self, shapes: Shapes) -> list[Share]:
        """The layers' tensors themselves.

        Args:
            shapes: the layers that take part.
        """
        return [self._share(pairs) for pairs in shapes]

    def total(self, grams: list[Grams], shapes: Shapes) -> list[Grams]:
        """What this process has summed.

        Args:
            grams: the sums of this process.
            shapes: not used.
        """
        return grams

    def _share(self, pairs: list[LoraPair]) -> Share:
        lora_A: list[Tensor] = [pair.lora_A for pair in pairs]
        lora_B: list[Tensor] = [pair.lora_B for pair in pairs]
        grads_A, grads_B = gradients_of(lora_A), gradients_of(lora_B)
        factors = Factors(lora_A, lora_B, [Part([pair.weight for pair in pairs], [pair.remainder for pair in pairs])])
        inputs = (lora_B, grads_B, lora_A, grads_A)
        spread_A, spread_B = partial(over_rows, lora_A, slice(None)), partial(over_columns, lora_B)
        return Share(inputs, factors, self._optimizer, lora_A, lora_B, spread_A, spread_B, _nothing)


def over_rows(like: list[Tensor], rows: slice, kernels: Kernels, factors: Float[Tensor, "layers r"]) -> list[Tensor]:
    """A `Spread` over rows.

    Args:
        like: the layers' tensors, with some of r rows.
        rows: which rows those are.
        kernels: the operations to use.
        factors: a factor of each row of each layer.
    """
    return kernels.expand_factors(factors[:, rows, None], like)


def over_columns(like: list[Tensor], kernels: Kernels, factors: Float[Tensor, "layers r"]) -> list[Tensor]:
    """A `Spread` over columns.

    Args:
        like: the layers' tensors, with r columns.
        kernels: the operations to use.
        factors: a factor of each column of each layer.
    """
    return kernels.expand_factors(factors[:, None, :], like)


def laid_out(
    pairs: list[LoraPair], optimizer: Optimizer, zero: Zero | None, kinds: Mapping[str, Kind], *, by_matrices: bool
) -> list[tuple[Layout, Shapes]]:
    """The layers that are rescaled together, with their layouts.

    Args:
        pairs: the LoRA pairs of one model, with remainders.
        optimizer: the optimizer of their factors.
        zero: what DeepSpeed's ZeRO has made of that; None without.
        kinds: how each entry of its state depends on the gradients.
        by_matrices: whether rescales are by matrices.

    Raises:
        UnsupportedLayerError: the layers' tensors are sharded in a way that is not supported.
    """
    # Here, because they import this.
    from scalora.parallel.stacks import Stacks, groups_of_stacks

    if zero is not None:
        from scalora.parallel.runs import layouts_of_runs

        return layouts_of_runs(pairs, zero, kinds, by_matrices)

    if any(pair.is_sharded for pair in pairs):
        from scalora.parallel.buckets import buckets_of_shards
        from scalora.parallel.rows import Rows

        buckets = buckets_of_shards(pairs, kinds, by_matrices=by_matrices)
        return [(Rows(optimizer, kinds, by_matrices), shapes) for shapes in buckets]
    single, stacks = ([pair for pair in pairs if pair.is_matrix is matrix] for matrix in (True, False))
    groups: list[tuple[Layout, Shapes]] = [
        (Whole(optimizer), [chunk for of_shape in by_shape(of_rank) for chunk in in_chunks(of_shape, of_shape)])
        for of_rank in by_rank(single)
    ]
    return groups + [(Stacks(optimizer, kinds), shapes) for shapes in groups_of_stacks(stacks)]


def ranks_in(shapes: Shapes) -> list[Shapes]:
    """Layers that are rescaled together, in lists whose scalings can be solved for together.

    Args:
        shapes: the layers, those of one rank beside each other.
    """
    return [list(of_rank) for _, of_rank in groupby(shapes, key=lambda pairs: rank_key(pairs[0]))]


def in_buckets(shapes: Shapes, bytes_of: Callable[[LoraPair], int], limit: int) -> list[Shapes]:
    """Layers in lists of at most so many bytes, or of one layer.

    Args:
        shapes: the layers, in lists of equal shapes.
        bytes_of: bytes of a layer.
        limit: the most bytes of a list.
    """
    buckets: list[Shapes] = [[]]
    space = limit
    for pairs in shapes:
        each, rest = bytes_of(pairs[0]), pairs
        while rest:
            if space < each and buckets[-1]:
                buckets.append([])
                space = limit
            fit = max(1, space // each) if each else len(rest)
            buckets[-1].append(rest[:fit])
            space -= each * len(rest[:fit])
            rest = rest[fit:]
    return buckets


def _nothing() -> None:
    pass
