"""Which part of each layer's tensors is in this process, so that a rescale gets plain tensors: the seam.

`Whole`: all of them, as with one process or DistributedDataParallel. `scalora.parallel.rows.Rows`: some rows of each,
as with FSDP2. `scalora.parallel.runs.Runs`: some entries of each, as with DeepSpeed's ZeRO. The mathematics and the
kernels see tensors without knowing which part of a matrix they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from scalora.maths.scaling import Grams
from scalora.model.adapters import LoraPair, by_rank, by_shape
from scalora.parallel.zero import Zero
from scalora.rescale.changes import Factors, Part
from scalora.rescale.kernels import Kernels
from scalora.rescale.optimizers import Kind
from scalora.rescale.transport import HoldsState

Shapes = list[list[LoraPair]]
"""Layers of one rank, in lists of equal shapes."""


Spread = Callable[[Kernels, Float[Tensor, "layers r"]], list[Tensor]]
"""Brings a factor of each of the layers' r columns into the shapes of the tensors that are multiplied by them."""


class Share(NamedTuple):
    """What this process works on in a rescale of layers of one shape: plain tensors.

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
    """Where the tensors of layers of one rank are."""

    def taking_part(self, shapes: Shapes) -> Shapes:
        """The layers that take part in this rescale.

        Args:
            shapes: all layers.
        """

    def shares(self, shapes: Shapes) -> list[Share]:
        """What this process works on, for the layers of each shape.

        Args:
            shapes: the layers that take part.
        """

    def total(self, grams: Grams, shapes: Shapes) -> Grams:
        """The layers' inner products, from what this process has summed.

        Args:
            grams: the sums of this process.
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

    def shares(self, shapes: Shapes) -> list[Share]:
        """The layers' tensors themselves.

        Args:
            shapes: the layers that take part.
        """
        return [self._share(pairs) for pairs in shapes]

    def total(self, grams: Grams, shapes: Shapes) -> Grams:
        """What this process has summed.

        Args:
            grams: the sums of this process.
            shapes: not used.
        """
        return grams

    def _share(self, pairs: list[LoraPair]) -> Share:
        lora_A: list[Tensor] = [pair.lora_A for pair in pairs]
        lora_B: list[Tensor] = [pair.lora_B for pair in pairs]
        grads_A, grads_B = ([p.grad for p in factors if p.grad is not None] for factors in (lora_A, lora_B))
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
    if zero is not None:
        from scalora.parallel.runs import layouts_of_runs

        return layouts_of_runs(pairs, zero, kinds, by_matrices)
    if not any(pair.is_sharded for pair in pairs):
        return [(Whole(optimizer), by_shape(of_rank)) for of_rank in by_rank(pairs)]
    from scalora.parallel.rows import Rows, groups_of_shards  # here, because it imports this

    return [(Rows(optimizer, kinds, by_matrices), shapes) for shapes in groups_of_shards(pairs)]


def _nothing() -> None:
    pass
