"""An exponential moving average of the model that ScaLoRA trains: of its function, not of its factors.

A rescale changes the coordinates of the factors and what has been merged, and leaves their sum as it is. So averages of
factors belong to no remainder, and this averages each layer's sum: the weight ``W + s·A·Bᵀ`` where the remainder is
dense, the update as a product of low rank where it is factored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from scalora.model.adapters import LoraPair, find_lora_pairs
from scalora.model.attachment import attachment_of
from scalora.rescale.remainder import DenseRemainder, FactoredRemainder, compress_full


class ModelEma(nn.Module):
    """Keeps an exponential moving average of a model with ScaLoRA attached.

    Examples:
        >>> ema = ModelEma(model, decay=0.999)  # after ScaLora(model, optimizer)
        >>> optimizer.step()
        >>> ema.update()
        >>> with ema.applied():  # evaluate, save_pretrained, merge_and_unload, …
        ...     model.save_pretrained("averaged")

    What else is trained, such as heads and biases, is averaged with it. The averages take the memory of the adapted
    weights in float32 where the remainder is dense; of four times its factors where it is factored. They are in
    `state_dict`, like those of `torch.optim.swa_utils.AveragedModel`, which is for models without ScaLoRA.

    Args:
        model: the model, with ScaLoRA attached. It must not be sharded.
        decay: share of the old average in the new one, from 0 to 1.
        rank: with a factored remainder, the most columns that a compression of an average keeps. None: twice those of
            the remainder, as the average of remainders is of a higher rank than each.

    Raises:
        ValueError: ScaLoRA is not attached to the model, or `decay` or `rank` is out of range.
        UnsupportedLayerError: the model is sharded.

    Attributes:
        decay: share of the old average in the new one.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, *, rank: int | None = None) -> None:
        super().__init__()
        if attachment_of(model) is None:
            raise ValueError("ModelEma averages a model with ScaLoRA attached: call ScaLora(model, optimizer) first")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be from 0 to 1; got {decay}")
        if rank is not None and rank < 1:
            raise ValueError(f"rank must be at least 1; got {rank}")
        self.decay = decay
        self._pairs = find_lora_pairs(model)
        factors = {id(p) for pair in self._pairs for p in (pair.lora_A, pair.lora_B)}
        self._others = [p for p in model.parameters() if p.requires_grad and id(p) not in factors]
        self.layers = nn.ModuleList([_average_of(pair, rank) for pair in self._pairs])
        self.others = nn.ParameterList([nn.Parameter(p.detach().clone(), requires_grad=False) for p in self._others])
        self.update(decay=0.0)

    @torch.no_grad()
    def update(self, *, decay: float | None = None) -> None:
        """Take the model as it is now into the average. Call it after the optimizer's step.

        Args:
            decay: for this update. None: `self.decay`. With n / (n + 1) in the n-th update, the average is the mean.

        Raises:
            ValueError: the adapter is merged.
        """
        if any(pair.layer.merged for pair in self._pairs):
            raise ValueError("the adapter is merged into the base weights: call unmerge_adapter() before ema.update()")
        decay = self.decay if decay is None else decay
        averages: list[_LayerAverage] = list(self.layers)  # type: ignore[arg-type]
        for average, pair in zip(averages, self._pairs, strict=True):
            average.update(pair, decay)
        compress_full(average.product for average in averages if isinstance(average, _OfUpdate))
        for mean, parameter in zip(self.others, self._others, strict=True):
            mean.lerp_(parameter, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context manager in which the model is its average, for evaluation and for saving; not for training.

        The factors stay as they are: what they lack of the average is in the remainders, or in the base weights.
        """
        with ExitStack() as stack:
            for average, pair in zip(self.layers, self._pairs, strict=True):
                stack.enter_context(average.applied(pair))  # type: ignore[operator]
            for mean, parameter in zip(self.others, self._others, strict=True):
                stack.enter_context(_overwritten(parameter, mean))
            yield


class _OfWeight(nn.Module):
    """The average of ``W + s·A·Bᵀ``, as stored."""

    weight: Tensor

    def __init__(self, pair: LoraPair) -> None:
        super().__init__()
        dtype = torch.promote_types(pair.weight.dtype, torch.float32)
        self.register_buffer("weight", torch.zeros_like(pair.weight, dtype=dtype))

    def update(self, pair: LoraPair, decay: float) -> None:
        assert isinstance(pair.remainder, DenseRemainder)
        present = pair.remainder.exact(pair.weight.detach()).to(self.weight.dtype) + self._product(pair)
        self.weight.lerp_(present, 1 - decay)

    @contextmanager
    def applied(self, pair: LoraPair) -> Iterator[None]:
        weight, remainder = pair.weight, pair.remainder
        assert isinstance(remainder, DenseRemainder)
        assert isinstance(weight, nn.Parameter)
        rounded_off, changed = remainder.rounded_off, remainder.changed
        with _overwritten(weight, weight.detach()):
            remainder.rebuild(self.weight - self._product(pair), weight)
            remainder.changed = True
            try:
                yield
            finally:
                remainder.rounded_off, remainder.changed = rounded_off, changed

    def _product(self, pair: LoraPair) -> Tensor:
        left, right = pair.lora_B.detach().to(self.weight.dtype), pair.lora_A.detach().to(self.weight.dtype)
        return pair.oriented(pair.scaling * left @ right)


class _OfUpdate(nn.Module):
    """The average of ``s·A·Bᵀ`` and the factored remainder."""

    def __init__(self, pair: LoraPair, rank: int | None) -> None:
        super().__init__()
        own = pair.layer.factored_remainder()
        added = pair.r + own.left.shape[1]
        kept = 2 * own.max_rank if rank is None else rank
        self.product = FactoredRemainder(pair.m, pair.n, kept, added, dtype=own.left.dtype, device=own.left.device)

    def update(self, pair: LoraPair, decay: float) -> None:
        self.product.scale(decay)
        self.product.append((1 - decay) * pair.scaling * pair.lora_B.detach(), pair.lora_A.detach().mT)
        left, right = pair.layer.factored_remainder().used
        self.product.append((1 - decay) * pair.layer.remainder_scaling * left, right)

    @contextmanager
    def applied(self, pair: LoraPair) -> Iterator[None]:
        left, right = self.product.used
        left = torch.cat([left, -pair.scaling * pair.lora_B.detach()], dim=1) / pair.layer.remainder_scaling
        right = torch.cat([right, pair.lora_A.detach().mT], dim=1)
        with pair.layer.factored_remainder().replaced(left, right):
            yield


_LayerAverage = _OfWeight | _OfUpdate


def _average_of(pair: LoraPair, rank: int | None) -> _LayerAverage:
    return _OfWeight(pair) if isinstance(pair.remainder, DenseRemainder) else _OfUpdate(pair, rank)


@contextmanager
def _overwritten(parameter: nn.Parameter, value: Tensor) -> Iterator[None]:
    """Context manager in which a parameter has another value."""
    before = parameter.detach().clone()
    parameter.data.copy_(value)
    try:
        yield
    finally:
        parameter.data.copy_(before)
