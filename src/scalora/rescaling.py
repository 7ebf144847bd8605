"""`Rescaling`: solve, merge and transport for all layers of a model (paper, section 5 and Algorithm 1).

The layers are rescaled in groups, each of one layout, whose tensors come together: while one group is merged, those of
the next one are on their way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from scalora.config import ScaLoraConfig
from scalora.maths.matrix import MatrixScaling
from scalora.maths.scaling import Grams, Scaling
from scalora.model.adapters import LoraPair
from scalora.model.solve_constants import ConstantsOnDevice, SolveConstants
from scalora.model.target_norms import Rates
from scalora.parallel.layout import Layout, Shapes, Share, Whole, ranks_in
from scalora.rescale.changes import Change, ColumnChange, MatrixChange, split
from scalora.rescale.kernels import Kernels
from scalora.rescale.metrics import Rescaled, remainder_energy
from scalora.rescale.optimizers import MATRIX, Kind
from scalora.rescale.remainder import FactoredRemainder, compress_full
from scalora.rescale.replay import GraphMemory, Number, Replay, addresses, is_recordable
from scalora.rescale.stochastic import StochasticRemainder
from scalora.rescale.transport import transform_gradients_and_states

PARTS = ("scalora::solve", "scalora::merge", "scalora::transport")
"""Names of the parts of a rescale in a profiler's trace."""

ScalingRule = Callable[..., Scaling | MatrixScaling]
"""Chooses α and β, or P and Q, for layers of one rank. Called with their `Grams` and ``target_norm``, (layers, 2)."""

Transport = Callable[..., None]
"""Transports gradients and optimizer state through a rescale. Has the arguments of `scale_gradients_and_states`."""


class Rescaling:
    """Rescales the layers of one model.

    Args:
        groups: the layers that are rescaled together, with their layouts.
        config: the settings.
        kinds: how each entry of the optimizer's state depends on the gradients.
        kernels: the operations to use.
        scaling_rule: chooses the factors, or the matrices.
        transport: transports gradients and optimizer state through a scaling of columns.
        repeatable: whether all of that launches the same on a GPU, whatever the values are, so that it can be replayed.
        memory: for what is replayed.
    """

    def __init__(
        self,
        groups: list[tuple[Layout, Shapes]],
        config: ScaLoraConfig,
        kinds: Mapping[str, Kind],
        kernels: Kernels,
        scaling_rule: ScalingRule,
        transport: Transport,
        *,
        repeatable: bool,
        memory: GraphMemory,
    ) -> None:
        self._groups = groups
        self._repeatable = repeatable
        self._replay = Replay[list[Rescaled]]("a rescale", memory)
        self._constants = [[ConstantsOnDevice(of_rank, config) for of_rank in ranks_in(shapes)] for _, shapes in groups]
        self._kinds = kinds
        self._kernels = kernels
        self._scaling_rule = scaling_rule
        self._transport = transport

    def run(self, rates: Mapping[str, Rates], skipped: Tensor | None, step: int) -> list[Rescaled]:
        """Rescale the layers that take part in this step.

        Args:
            rates: the base learning rates of each layer's lora_A and lora_B, by its name.
            skipped: a scalar that is positive if the optimizer is going to skip the step; None if it can't.
            step: number of the optimizer step, for the random numbers of stochastic remainders.

        Returns:
            What was done, for the layers of each group and rank.
        """
        active = [
            (index, shapes)
            for index, (layout, group) in enumerate(self._groups)
            if (shapes := layout.taking_part(group))
        ]
        if not active:
            return []
        constants = [
            [
                of_rank.of([pair for pairs in shapes_of_rank for pair in pairs], rates)
                for shapes_of_rank, of_rank in zip(ranks_in(shapes), self._constants[index], strict=True)
            ]
            for index, shapes in active
        ]
        pairs = [pair for _, shapes in active for of_shape in shapes for pair in of_shape]
        numbers: dict[str, Number] = {} if skipped is None else {"skipped": skipped}
        if any(isinstance(pair.remainder, StochasticRemainder) for pair in pairs):
            numbers["step"] = float(step)
        factored = self._make_room(pairs)
        rescaled = self._replay(
            partial(self._rescale, active, constants),
            self._key(active, constants),
            [factor for pair in pairs for factor in (pair.lora_A, pair.lora_B)],
            numbers,
            variant=tuple([remainder.columns for remainder in factored]),
            also_changed=[*(pair.weight for pair in pairs), *(half for r in factored for half in (r.left, r.right))],
            changes_gradients=True,
        )
        self._compress(factored)
        return rescaled

    def forget_recording(self) -> None:
        """Free what is kept to replay rescales."""
        self._replay.forget()

    def _key(self, active: list[tuple[int, Shapes]], constants: list[list[SolveConstants]]) -> Hashable:
        """What the kernels of a rescale depend on; None if they can't be replayed."""
        tensors = [tensor for of_group in constants for of_rank in of_group for tensor in of_rank]
        if not self._repeatable or not is_recordable(tensor.device for tensor in tensors):
            return None
        for index, shapes in active:
            layout, _ = self._groups[index]
            if type(layout) is not Whole:
                return None  # others work on copies, or on what collectives bring
            tensors += layout.tensors_of(shapes)
        return addresses(tensors)

    def _make_room(self, pairs: list[LoraPair]) -> list[FactoredRemainder]:
        """Have factored remainders put as many columns to use as a rescale fills: what the host has to know of it.

        Args:
            pairs: the layers.

        Returns:
            Their factored remainders.
        """
        of_ranks = [(pair.remainder, pair.r) for pair in pairs if isinstance(pair.remainder, FactoredRemainder)]
        factored = [remainder for remainder, _ in of_ranks]
        self._compress(factored)  # those of a rescale that ended in an error
        for remainder, r in of_ranks:
            remainder.make_room(r)
        return factored

    def _compress(self, remainders: list[FactoredRemainder]) -> None:
        with record_function(PARTS[1]):
            compress_full(remainders)

    def _rescale(
        self,
        active: list[tuple[int, Shapes]],
        constants: list[list[SolveConstants]],
        numbers: Mapping[str, Number],
    ) -> list[Rescaled]:
        """Rescale layers, given the constants of those of each group and rank."""
        skipped, step = numbers.get("skipped"), numbers.get("step")
        assert skipped is None or isinstance(skipped, Tensor)
        if step is not None:
            for remainder in (pair.remainder for _, shapes in active for pairs in shapes for pair in pairs):
                if isinstance(remainder, StochasticRemainder):
                    remainder.step = step if isinstance(step, Tensor) else int(step)
        self._begin(*active[0])
        rescaled: list[Rescaled] = []
        for position, (index, shapes) in enumerate(active):
            following = active[position + 1 : position + 2]
            rescaled += self._rescale_group(index, shapes, following, constants[position], skipped)
        return rescaled

    def _begin(self, index: int, shapes: Shapes) -> None:
        with record_function(PARTS[0]):
            self._groups[index][0].begin(shapes)

    def _rescale_group(
        self,
        index: int,
        shapes: Shapes,
        following: list[tuple[int, Shapes]],
        constants: list[SolveConstants],
        skipped: Tensor | None,
    ) -> list[Rescaled]:
        """Solve, merge and transport for layers that are rescaled together, while the following ones' tensors come."""
        layout, _ = self._groups[index]
        with record_function(PARTS[0]):
            shares = layout.shares(shapes)
            grams = layout.total([self._kernels.grams(*share.grams) for share in shares], shapes)
        for group in following:
            self._begin(*group)
        rescaled, done = [], 0
        for of_rank, constants_of_rank in zip(ranks_in(shapes), constants, strict=True):
            here = slice(done, done := done + len(of_rank))
            rescaled.append(self._rescale_rank(of_rank, shares[here], grams[here], constants_of_rank, skipped))
        return rescaled

    def _rescale_rank(
        self,
        shapes: Shapes,
        shares: list[Share],
        parts: list[Grams],
        constants: SolveConstants,
        skipped: Tensor | None,
    ) -> Rescaled:
        """Solve, merge and transport for layers of one rank.

        The solve is batched over all layers, the other operations over the layers of each shape, except for the merge,
        which takes one operation per weight.
        """
        sizes = [len(share.factors.lora_A) for share in shares]
        with record_function(PARTS[0]):
            grams = Grams(*map(torch.cat, zip(*parts, strict=True)))
            scaling = self._scaling_rule(grams, target_norm=constants.target_norms)
            if skipped is not None:
                scaling = scaling.unless(skipped.to(grams.left.device) > 0)
            change = self._change_of(scaling, shapes[0][0].dtype)
        scalings = torch.split(constants.merge_scaling, sizes)
        for share, of_shape, merge_scaling in zip(shares, split(change, sizes), scalings, strict=True):
            self._apply(share, of_shape, merge_scaling)
        return Rescaled(scaling, remainder_energy(grams, constants.scaling[..., None] * change.merged_matrix))

    def _change_of(self, scaling: Scaling | MatrixScaling, dtype: torch.dtype) -> Change:
        if isinstance(scaling, MatrixScaling):
            return MatrixChange.of(scaling)
        change = ColumnChange.of(scaling, dtype)
        return change.as_matrices() if MATRIX in self._kinds.values() else change

    def _apply(self, share: Share, change: Change, scaling: Tensor) -> None:
        """Merge the remainders of layers of one shape, then change their factors, gradients and optimizer state."""
        with record_function(PARTS[1]):
            change.apply(share.factors, self._kernels, scaling)
        with record_function(PARTS[2]):
            if isinstance(change, MatrixChange):
                for factors, matrices, tall in ((share.lora_B, change.Q, True), (share.lora_A, change.P, False)):
                    transform_gradients_and_states(
                        share.optimizer, self._kinds, factors, matrices, change.changed, tall=tall
                    )
            else:
                for factors, spread in (
                    (share.lora_B, share.spread_B(self._kernels, change.beta)),
                    (share.lora_A, share.spread_A(self._kernels, change.alpha)),
                ):
                    self._transport(share.optimizer, self._kinds, factors, spread, self._kernels.multiply)
            share.finish()
