"""Rescales of layers that are not one matrix: each expert of a mixture is a layer of its own, with tensors of its own.

The matrices of experts are pieces of memory in ``lora_A``, its gradient and its moments, and in the weight, so a
rescale works on these. In ``lora_B`` they have every E-th column, so it works on copies, which are copied back in one
operation for all experts of a layer. A convolution's tensors are taken for matrices in the same memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from scalora.model.adapters import LoraPair, by_rank, by_shape
from scalora.model.matrices import stack_of_A, stack_of_B
from scalora.parallel.layout import Shapes, Share, Whole, in_buckets, over_columns, over_rows
from scalora.rescale.changes import Factors, Part
from scalora.rescale.optimizers import MATRIX, Kind
from scalora.rescale.transport import gradients_of

# Bytes of factors and gradients beyond which layers are rescaled in several goes. Copies of them, and of the moments,
# are on the device for the time of a rescale.
_BUCKET = 1 << 28


class Stacks(Whole):
    """Every process has everything, and layers are stacks of matrices.

    Layers without gradients take no part. An expert that saw no token has a gradient of zeros, and is left alone.

    Args:
        optimizer: the optimizer of the factors.
        kinds: how each entry of its state depends on the gradients.
    """

    def __init__(self, optimizer: Optimizer, kinds: Mapping[str, Kind]) -> None:
        super().__init__(optimizer)
        self._kinds = kinds

    def _share(self, pairs: list[LoraPair]) -> Share:
        parts = _Parts(self._optimizer, self._kinds)
        lora_A = [part for pair in pairs for part in parts.of(pair.lora_A, pair.experts, stack_of_A)]
        lora_B = [part for pair in pairs for part in parts.of(pair.lora_B, pair.experts, stack_of_B)]
        grads_A, grads_B = gradients_of(lora_A), gradients_of(lora_B)
        weights = [pair.matrices_of_weight(pair.weight.detach()) for pair in pairs]
        remainders = [
            pair.remainder.by_matrix(pair.weight, of_pair) for pair, of_pair in zip(pairs, weights, strict=True)
        ]
        factors = Factors(
            lora_A,
            lora_B,
            [
                Part(
                    [weight for of_pair in weights for weight in of_pair],
                    [remainder for of_pair in remainders for remainder in of_pair],
                )
            ],
        )
        spread_A, spread_B = partial(over_rows, lora_A, slice(None)), partial(over_columns, lora_B)

        def finish() -> None:
            parts.copy_back()
            for pair, of_pair in zip(pairs, remainders, strict=True):
                pair.remainder.follow(of_pair)  # type: ignore[arg-type]  # of the same kind

        return Share((lora_B, grads_B, lora_A, grads_A), factors, parts, lora_A, lora_B, spread_A, spread_B, finish)


class _Parts:
    """The matrices of parameters, with gradients, and their state, as an optimizer holds it.

    Args:
        optimizer: the optimizer that holds the state of the parameters.
        kinds: how each entry of its state depends on the gradients.
    """

    def __init__(self, optimizer: Optimizer, kinds: Mapping[str, Kind]) -> None:
        self.state: dict[Tensor, dict[str, Any]] = defaultdict(dict)
        self._optimizer = optimizer
        self._kinds = kinds
        self._copies: list[tuple[Tensor, Tensor]] = []

    def of(self, parameter: nn.Parameter, experts: int, stack: Callable[[Tensor, int], Tensor]) -> list[Tensor]:
        """The matrices of a parameter, with their gradients, after taking in their state.

        Args:
            parameter: a lora_A or lora_B with a gradient.
            experts: the number of matrices.
            stack: gives a view of a tensor of the parameter's shape as so many matrices.
        """
        assert parameter.grad is not None
        parts = self._pieces(stack(parameter.detach(), experts))
        for part, gradient in zip(parts, self._pieces(stack(parameter.grad, experts)), strict=True):
            part.grad = gradient
        for key, value in self._optimizer.state.get(parameter, {}).items():
            if self._kinds.get(key) == MATRIX:
                of_parts = list(value) if experts > 1 else [value]
            elif self._kinds.get(key) and value.shape == parameter.shape:
                of_parts = self._pieces(stack(value, experts))
            else:
                continue  # a rescale does not change it
            for part, of_part in zip(parts, of_parts, strict=True):
                self.state[part][key] = of_part
        return parts

    def _pieces(self, stack: Tensor) -> list[Tensor]:
        """Matrices that are pieces of memory; copies of those that are scattered."""
        pieces = stack.contiguous()
        if pieces is not stack:
            self._copies.append((stack, pieces))
        return list(pieces)

    def copy_back(self) -> None:
        """Overwrite scattered matrices with their copies."""
        for scattered, pieces in self._copies:
            scattered.copy_(pieces)


def groups_of_stacks(pairs: list[LoraPair]) -> list[Shapes]:
    """The layers that are rescaled together: of one rank, and not too many bytes.

    Args:
        pairs: LoRA pairs that are not one matrix, with remainders.
    """
    return [group for of_rank in by_rank(pairs) for group in in_buckets(by_shape(of_rank), _bytes, _BUCKET)]


def _bytes(pair: LoraPair) -> int:
    return 2 * (pair.lora_A.nbytes + pair.lora_B.nbytes)
