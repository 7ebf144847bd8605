"""Rescales of layers whose factors and optimizer state are divided by entries over processes (DeepSpeed's ZeRO).

One collective gathers the factors and their gradients, of which every process has a run. Then all processes compute the
same rescale, and change their runs of the factors, gradients and state, and what they have of the base weights: all of
them with ZeRO-1 and ZeRO-2, a run of each with ZeRO-3. No base weight is gathered.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scalora.maths.scaling import Grams
from scalora.model.adapters import LoraPair, by_rank, by_shape
from scalora.parallel.flat import Rectangle, Run, gathered, rectangles
from scalora.parallel.layout import Layout, Shapes, Share, over_columns, over_rows
from scalora.parallel.shards import copy_all
from scalora.parallel.traffic import gathered_by_zero
from scalora.parallel.zero import Zero, run_of_weight
from scalora.rescale.changes import Factors, Part
from scalora.rescale.kernels import Kernels
from scalora.rescale.optimizers import LINEAR, Kind
from scalora.rescale.remainder import DenseRemainder

BUCKET = 1 << 28
"""Bytes that a collective gathers at once, beyond which the layers are rescaled in several goes. They are on every
device for the time of a rescale, and twice while they are put together."""

# Products with fewer rows are computed in another way, and rounded differently (torch 2.13 on CPUs). Weights in half
# precision shall have the same bits as in one process.
_LEAST_ROWS = 8

_FACTORS = ("lora_A", "lora_B")

# What is gathered of a factor: its layer, which factor it is, and "values", "gradient" or a key of its state.
_Key = tuple[int, str, str]

# Where to copy to, and what.
_Copy = tuple[Tensor, Tensor]


class Runs:
    """Every process has a run of each factor. All layers of a group take part in its step, because all processes must.

    Args:
        zero: the optimizer that holds the runs.
        kinds: how each entry of its state depends on the gradients.
        by_matrices: whether rescales are by matrices, which mix the entries of gradients and moments.
    """

    def __init__(self, zero: Zero, kinds: Mapping[str, Kind], by_matrices: bool) -> None:
        self._zero = zero
        self._kinds = kinds
        self._by_matrices = by_matrices

    def taking_part(self, shapes: Shapes) -> Shapes:
        """The layers if their group is the one that the optimizer is stepping: it steps one after the other.

        Args:
            shapes: all layers, of one group.
        """
        return shapes if self._zero.is_stepping(self._run(shapes[0][0], "lora_A")) else []

    def begin(self, shapes: Shapes) -> None:
        """Nothing: the collective is part of `shares`.

        Args:
            shapes: not used.
        """

    def shares(self, shapes: Shapes) -> list[Share]:
        """What this process works on, with one collective.

        Args:
            shapes: the layers.
        """
        keys, parts, runs = zip(*(piece for pairs in shapes for piece in self._to_gather(pairs)), strict=True)
        wholes = gathered(parts, [run.cut for run in runs], runs[0].axis)
        device = shapes[0][0].lora_A.device
        found = {key: whole.view(run.shape).to(device) for key, run, whole in zip(keys, runs, wholes, strict=True)}
        return [self._share(pairs, found) for pairs in shapes]

    def total(self, grams: list[Grams], shapes: Shapes) -> list[Grams]:
        """What this process has summed: every process sums everything.

        Args:
            grams: the sums.
            shapes: not used.
        """
        return grams

    def _run(self, pair: LoraPair, factor: str) -> Run:
        return self._zero.run_of(pair.lora_A if factor == "lora_A" else pair.lora_B)

    def _parts(self, run: Run) -> Iterator[tuple[str, Tensor]]:
        """What a rescale by matrices has to have whole of a factor, besides its values."""
        yield "gradient", run.within(_gradient(run))
        if self._by_matrices:
            for key, value in self._zero.optimizer.state.get(run.flat, {}).items():
                if isinstance(value, Tensor) and value.shape == run.flat.shape and self._kinds.get(key) == LINEAR:
                    yield key, run.within(value)

    def _to_gather(self, pairs: list[LoraPair]) -> Iterator[tuple[_Key, Tensor, Run]]:
        for pair in pairs:
            for factor in _FACTORS:
                run = self._run(pair, factor)
                yield (id(pair), factor, "values"), run.values, run
                for key, part in self._parts(run):
                    yield (id(pair), factor, key), part, run

    def _share(self, pairs: list[LoraPair], found: Mapping[_Key, Tensor]) -> Share:
        (whole_A, grads_A), (whole_B, grads_B) = (
            [[found[id(pair), factor, what] for pair in pairs] for what in ("values", "gradient")]
            for factor in _FACTORS
        )
        inputs = (whole_B, grads_B, whole_A, grads_A)
        parts, copies = _parts_of_weights(pairs)
        factors = Factors(whole_A, whole_B, parts)
        finish = partial(self._finish, pairs, found, copies)
        state = _State()
        if self._by_matrices:
            for pair in pairs:
                for factor in _FACTORS:
                    state.take_whole(pair, factor, found)
            spread_A, spread_B = partial(over_rows, whole_A, slice(None)), partial(over_columns, whole_B)
            return Share(inputs, factors, state, whole_A, whole_B, spread_A, spread_B, finish)
        runs_A, runs_B = ([self._run(pair, factor) for pair in pairs] for factor in _FACTORS)
        params_A, params_B = ([state.take(self._zero, run) for run in runs] for runs in (runs_A, runs_B))
        spread_A, spread_B = partial(_over_runs, runs_A, True), partial(_over_runs, runs_B, False)
        return Share(inputs, factors, state, params_A, params_B, spread_A, spread_B, finish)

    def _finish(self, pairs: list[LoraPair], found: Mapping[_Key, Tensor], copies: list[_Copy]) -> None:
        """Copy the entries that are here of what has been changed as a whole, back to where they came from."""
        changed: list[_Copy] = []
        for pair in pairs:
            if isinstance(pair.remainder, DenseRemainder):
                pair.remainder.changed = True
            for factor in _FACTORS:
                run = self._run(pair, factor)
                parts = {"values": run.values} | (dict(self._parts(run)) if self._by_matrices else {})
                for key, part in parts.items():
                    changed.append((part, found[id(pair), factor, key].reshape(-1)[run.entries]))
        for of_a_kind in (changed, copies):
            copy_all([part for part, _ in of_a_kind], [entries for _, entries in of_a_kind])


class _State:
    """The state of tensors that stand for factors, as an optimizer holds it."""

    def __init__(self) -> None:
        self.state: dict[Tensor, dict[str, Any]] = {}

    def take(self, zero: Zero, run: Run) -> Tensor:
        """A run, with its gradient, and its state in here."""
        part = run.values
        part.grad = run.within(_gradient(run))
        self.state[part] = {
            key: run.within(value) if isinstance(value, Tensor) and value.shape == run.flat.shape else value
            for key, value in zero.optimizer.state.get(run.flat, {}).items()
        }
        return part

    def take_whole(self, pair: LoraPair, factor: str, found: Mapping[_Key, Tensor]) -> None:
        """Give a whole factor its gradient, and its state in here."""
        own = id(pair), factor
        of_factor = {key: whole for (of_pair, name, key), whole in found.items() if (of_pair, name) == own}
        whole = of_factor.pop("values")
        whole.grad = of_factor.pop("gradient")
        self.state[whole] = of_factor


def layouts_of_runs(
    pairs: list[LoraPair], zero: Zero, kinds: Mapping[str, Kind], by_matrices: bool
) -> list[tuple[Layout, Shapes]]:
    """The layers that are rescaled together: of one rank and one group of the optimizer, and not too many bytes.

    Args:
        pairs: the LoRA pairs of one model, with remainders.
        zero: the optimizer that holds them.
        kinds: how each entry of its state depends on the gradients.
        by_matrices: whether rescales are by matrices.
    """
    layout = Runs(zero, kinds, by_matrices)
    groups: list[tuple[Layout, Shapes]] = []
    for of_rank in by_rank(pairs):
        by_group: dict[int, list[LoraPair]] = defaultdict(list)
        for pair in of_rank:
            by_group[id(zero.run_of(pair.lora_A).flat)].append(pair)
        groups += [(layout, shapes) for of_group in by_group.values() for shapes in _in_buckets(of_group, zero)]
    return groups


def _in_buckets(pairs: list[LoraPair], zero: Zero) -> list[Shapes]:
    """Layers in lists of at most `BUCKET` bytes that are gathered, with as many of each process as can be."""

    def place_in_stretch(pair: LoraPair) -> int:
        cut = zero.run_of(pair.lora_A).cut
        return cut.offset % cut.size

    buckets: list[list[LoraPair]] = [[]]
    space = BUCKET
    for pair in sorted(pairs, key=place_in_stretch):
        size = gathered_by_zero(pair.m, pair.n, pair.r, entry_bytes=pair.dtype.itemsize)
        if space < size and buckets[-1]:
            buckets.append([])
            space = BUCKET
        buckets[-1].append(pair)
        space -= size
    shapes = []
    for bucket in buckets:
        alike: dict[Any, list[LoraPair]] = defaultdict(list)
        for pair in bucket:
            alike[pair.transposed, pair.weight.dtype, type(pair.remainder)].append(pair)
        shapes.append([shape for some in alike.values() for shape in by_shape(some)])
    return shapes


def _parts_of_weights(pairs: list[LoraPair]) -> tuple[list[Part], list[_Copy]]:
    """What is here of the base weights of layers of one shape, and what of it has to be copied back after a merge."""
    remainders = [pair.remainder for pair in pairs]
    runs = [run for pair in pairs if (run := run_of_weight(pair.weight)) is not None]
    dense = [remainder for remainder in remainders if isinstance(remainder, DenseRemainder)]
    if not runs or not dense:
        return [Part([pair.weight for pair in pairs], remainders)], []
    parts: list[Part] = []
    copies: list[_Copy] = []
    for rectangle in rectangles(runs[0].entries, runs[0].shape[1]):
        weights, of_part = [], []
        for remainder, run in zip(dense, runs, strict=True):
            weight, first_row, copied = _block(run, run.flat, rectangle)
            low = None
            copies += copied
            if remainder.rounded_off is not None:
                low, _, copied = _block(run, remainder.rounded_off, rectangle)
                copies += copied
            weights.append(weight)
            of_part.append(remainder.of_part(low, first_row))
        rows = slice(first_row, first_row + len(weights[0]))
        of_W = {"columns" if pairs[0].transposed else "rows": rows}
        parts.append(Part(weights, of_part, **of_W, device=weights[0].device))
    return parts, copies


def _block(run: Run, flat: Tensor, rectangle: Rectangle) -> tuple[Tensor, int, list[_Copy]]:
    """Whole rows of a weight that have a rectangle of it in them.

    Args:
        run: the run that the rectangle is in.
        flat: the weight's entries, or their rounding errors.
        rectangle: the rectangle.

    Returns:
        The rows, the number of the first, and what is to be copied back if they are copies.
    """
    rows, columns, entries = rectangle
    here = run.within(flat.detach())[entries].view(rows.stop - rows.start, columns.stop - columns.start)
    if here.shape[1] == run.shape[1] and len(here) >= _LEAST_ROWS:
        return here, rows.start, []
    first = max(0, min(rows.start, run.shape[0] - _LEAST_ROWS))
    block = here.new_zeros(min(_LEAST_ROWS, run.shape[0]), run.shape[1])
    within = block[rows.start - first : rows.stop - first, columns]
    within.copy_(here)
    return block, first, [(here, within)]


def _over_runs(runs: list[Run], by_rows: bool, kernels: Kernels, factors: Float[Tensor, "layers r"]) -> list[Tensor]:
    """A `Spread` over runs of matrices: a factor for each row, or for each column."""
    spread = []
    for run, of_layer in zip(runs, factors, strict=True):
        numbers = torch.arange(run.entries.start, run.entries.stop, device=of_layer.device)
        columns = run.shape[1]
        numbers = numbers.div(columns, rounding_mode="floor") if by_rows else numbers % columns
        spread.append(of_layer[numbers].to(run.flat.device))
    return spread


def _gradient(run: Run) -> Tensor:
    return torch.zeros_like(run.flat) if run.flat.grad is None else run.flat.grad
