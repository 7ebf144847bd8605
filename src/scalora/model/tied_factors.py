"""Factors of an output head that are the input embedding's, transposed: PEFT's ``ensure_weight_tying``.

PEFT 0.21 keeps such factors in two parameters each, of one memory and with gradients of their own. ScaLoRA takes them
for one pair, the embedding's, whose gradient is the sum of both. The head has the embedding's remainder, transposed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from scalora.model.adapters import LoraPair
from scalora.rescale.remainder import FactoredRemainder


class TransposedRemainder(FactoredRemainder):
    """A factored remainder that is another layer's, transposed. It has no tensors of its own, and nothing adds to it.

    Args:
        of: the other layer's remainder.
    """

    def __init__(self, of: FactoredRemainder) -> None:
        nn.Module.__init__(self)
        self._of = [of]  # in a list, so that it is a submodule of one layer alone

    @property
    def left(self) -> Tensor:  # type: ignore[override]
        """The other's right factor."""
        return self._of[0].right

    @property
    def right(self) -> Tensor:  # type: ignore[override]
        """The other's left factor."""
        return self._of[0].left

    @property
    def columns(self) -> int:  # type: ignore[override]
        """The other's number of columns that are in use."""
        return self._of[0].columns

    @property
    def changed(self) -> bool:  # type: ignore[override]
        """Whether the other has any."""
        return self._of[0].changed

    def clear(self) -> None:
        """Nothing: whoever clears it clears the other, too."""

    def _apply(self, fn: Any, recurse: bool = True) -> TransposedRemainder:
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("left", "right"):  # the other has read them
            state_dict.pop(prefix + name, None)


@torch.no_grad()
def sum_gradients(pairs: Iterable[LoraPair]) -> None:
    """Add the gradients of heads to those of the embeddings whose factors they share, so that one step takes both.

    Args:
        pairs: LoRA pairs.
    """
    for pair in pairs:
        if pair.twin is not None:
            for own, other in ((pair.lora_A, pair.twin.lora_B), (pair.lora_B, pair.twin.lora_A)):
                if other.grad is not None:
                    transposed = other.grad.mT.contiguous()
                    own.grad = transposed if own.grad is None else own.grad.add_(transposed)
                    other.grad = None
