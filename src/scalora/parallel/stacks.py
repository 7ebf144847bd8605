"""Rescales of experts that are one parameter: each is a layer of its own, with plain tensors of its own.

The parts of experts are pieces of memory in ``lora_A``, its gradient and its moments, and in the weight, so a rescale
works on these. In ``lora_B`` they are every E-th column, so it works on copies, which are copied back in one operation
for all experts of a layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from scalora.maths.scaling import Grams
from scalora.model.adapters import LoraPair, by_rank, by_shape
from scalora.model.experts import columns_of_experts, rows_of_experts
from scalora.parallel.layout import Shapes, Share, in_buckets, with_gradients
from scalora.rescale.changes import Factors
from scalora.rescale.optimizers import MATRIX, Kind

# Bytes of factors and gradients beyond which layers are rescaled in several goes. Copies of them, and of the moments,
# are on the device for the time of a rescale.
_BUCKET = 1 << 28


class Stacks:
    """Every process has everything, and layers are stacks of experts. Layers without gradients take no part.

    Args:
        optimizer: the optimizer of the factors.
        kinds: how each entry of its state depends on the gradients.
    """

    def __init__(self, optimizer: Optimizer, kinds: Mapping[str, Kind]) -> None:
        self._optimizer = optimizer
        self._kinds = kinds

    def taking_part(self, shapes: Shapes) -> Shapes:
        """The layers that have gradients. An expert that saw no token has a gradient of zeros, and is left alone.

        Args:
            shapes: all layers.
        """
        return with_gradients(shapes)

    def shares(self, shapes: Shapes) -> list[Share]:
        """The tensors of each expert.

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
        parts = _Parts(self._optimizer, self._kinds)
        lora_A = [part for pair in pairs for part in parts.of(pair.lora_A, pair.experts, _Parts.rows)]
        lora_B = [part for pair in pairs for part in parts.of(pair.lora_B, pair.experts, parts.columns)]
        grads_A, grads_B = ([p.grad for p in factors if p.grad is not None] for factors in (lora_A, lora_B))
        remainders = [pair.remainder.by_expert(pair.weight) for pair in pairs]
        factors = Factors(
            lora_A,
            lora_B,
            [weight for pair in pairs for weight in pair.weight.detach()],
            [remainder for of_pair in remainders for remainder in of_pair],
        )

        def finish() -> None:
            parts.copy_back()
            for pair, of_pair in zip(pairs, remainders, strict=True):
                pair.remainder.follow(of_pair)  # type: ignore[arg-type]  # of the same kind

        return Share((lora_B, grads_B, lora_A, grads_A), factors, parts, lora_A, lora_B, slice(None), finish)


class _Parts:
    """The experts' parts of parameters, with gradients, and their state, as an optimizer holds it.

    Args:
        optimizer: the optimizer that holds the state of the parameters.
        kinds: how each entry of its state depends on the gradients.
    """

    def __init__(self, optimizer: Optimizer, kinds: Mapping[str, Kind]) -> None:
        self.state: dict[Tensor, dict[str, Any]] = defaultdict(dict)
        self._optimizer = optimizer
        self._kinds = kinds
        self._copies: list[tuple[Tensor, Tensor]] = []

    @staticmethod
    def rows(tensor: Tensor, experts: int) -> list[Tensor]:
        """The parts of what has the shape of lora_A, in its memory."""
        return list(rows_of_experts(tensor, experts))

    def columns(self, tensor: Tensor, experts: int) -> list[Tensor]:
        """Copies of the parts of what has the shape of lora_B."""
        scattered = columns_of_experts(tensor, experts)
        copied = scattered.contiguous()
        self._copies.append((scattered, copied))
        return list(copied)

    def copy_back(self) -> None:
        """Overwrite the scattered parts with their copies."""
        for scattered, copied in self._copies:
            scattered.copy_(copied)

    def of(self, parameter: nn.Parameter, experts: int, split: Callable[[Tensor, int], list[Tensor]]) -> list[Tensor]:
        """The parts of a parameter, with their gradients, after taking in their state."""
        assert parameter.grad is not None
        parts = split(parameter.detach(), experts)
        for part, gradient in zip(parts, split(parameter.grad, experts), strict=True):
            part.grad = gradient
        for key, value in self._optimizer.state.get(parameter, {}).items():
            if self._kinds.get(key) == MATRIX:
                of_experts = list(value)
            elif self._kinds.get(key) and value.shape == parameter.shape:
                of_experts = split(value, experts)
            else:
                continue  # a rescale does not change it
            for part, of_expert in zip(parts, of_experts, strict=True):
                self.state[part][key] = of_expert
        return parts


def groups_of_stacks(pairs: list[LoraPair]) -> list[Shapes]:
    """The layers that are rescaled together: of one rank, and not too many bytes.

    Args:
        pairs: LoRA pairs over stacks of experts, with remainders.
    """
    return [group for of_rank in by_rank(pairs) for group in in_buckets(by_shape(of_rank), _bytes, _BUCKET)]


def _bytes(pair: LoraPair) -> int:
    return 2 * (pair.lora_A.nbytes + pair.lora_B.nbytes)
