"""`Rescaling`: solve, merge and transport for all layers of a model (paper, section 5 and Algorithm 1).

The layers are rescaled in groups, each of one layout, whose tensors come together: while one group is merged, those of
the next one are on their way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from scalora.config import ScaLoraConfig
from scalora.maths.matrix import MatrixScaling
from scalora.maths.scaling import Grams, Scaling
from scalora.model.solve_constants import ConstantsOnDevice
from scalora.model.target_norms import Rates
from scalora.parallel.layout import Layout, Shapes, Share, ranks_in
from scalora.rescale.changes import Change, ColumnChange, MatrixChange, split
from scalora.rescale.kernels import Kernels
from scalora.rescale.metrics import Rescaled, remainder_energy
from scalora.rescale.optimizers import MATRIX, Kind
from scalora.rescale.remainder import compress_full
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
    """

    def __init__(
        self,
        groups: list[tuple[Layout, Shapes]],
        config: ScaLoraConfig,
        kinds: Mapping[str, Kind],
        kernels: Kernels,
        scaling_rule: ScalingRule,
        transport: Transport,
    ) -> None:
        self._groups = groups
        self._constants = [[ConstantsOnDevice(of_rank, config) for of_rank in ranks_in(shapes)] for _, shapes in groups]
        self._kinds = kinds
        self._kernels = kernels
        self._scaling_rule = scaling_rule
        self._transport = transport

    def run(self, rates: Mapping[str, Rates], skipped: Tensor | None) -> list[Rescaled]:
        """Rescale the layers that take part in this step.

        Args:
            rates: the base learning rates of each layer's lora_A and lora_B, by its name.
            skipped: a scalar that is positive if the optimizer is going to skip the step; None if it can't.

        Returns:
            What was done, for the layers of each group and rank.
        """
        active = [
            (index, shapes)
            for index, (layout, group) in enumerate(self._groups)
            if (shapes := layout.taking_part(group))
        ]
        if active:
            self._begin(*active[0])
        rescaled: list[Rescaled] = []
        for position, (index, shapes) in enumerate(active):
            following = active[position + 1 : position + 2]
            rescaled += self._rescale_group(index, shapes, following, rates, skipped)
        return rescaled

    def _begin(self, index: int, shapes: Shapes) -> None:
        with record_function(PARTS[0]):
            self._groups[index][0].begin(shapes)

    def _rescale_group(
        self,
        index: int,
        shapes: Shapes,
        following: list[tuple[int, Shapes]],
        rates: Mapping[str, Rates],
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
        for of_rank, constants in zip(ranks_in(shapes), self._constants[index], strict=True):
            here = slice(done, done := done + len(of_rank))
            rescaled.append(self._rescale_rank(of_rank, shares[here], grams[here], constants, rates, skipped))
        return rescaled

    def _rescale_rank(
        self,
        shapes: Shapes,
        shares: list[Share],
        parts: list[Grams],
        constants_of: ConstantsOnDevice,
        rates: Mapping[str, Rates],
        skipped: Tensor | None,
    ) -> Rescaled:
        """Solve, merge and transport for layers of one rank.

        The solve is batched over all layers, the other operations over the layers of each shape, except for the merge,
        which takes one operation per weight.
        """
        sizes = [len(share.factors.lora_A) for share in shares]
        with record_function(PARTS[0]):
            constants = constants_of.of([pair for pairs in shapes for pair in pairs], rates)
            grams = Grams(*map(torch.cat, zip(*parts, strict=True)))
            scaling = self._scaling_rule(grams, target_norm=constants.target_norms)
            if skipped is not None:
                scaling = scaling.unless(skipped.to(grams.left.device) > 0)
            change = self._change_of(scaling, shapes[0][0].dtype)
        scalings = torch.split(constants.merge_scaling, sizes)
        for share, of_shape, merge_scaling in zip(shares, split(change, sizes), scalings, strict=True):
            self._apply(share, of_shape, merge_scaling)
        with record_function(PARTS[1]):
            compress_full(pair.remainder for pairs in shapes for pair in pairs)
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
