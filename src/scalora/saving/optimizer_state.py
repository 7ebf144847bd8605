"""Keeps an engine's counts in its optimizer's state dict, so that whatever saves model and optimizer saves all of it.

Accelerate's ``save_state``, Lightning's checkpoints, Fabric's ``save`` and plain loops save these two. The remainders
are in the model's state dict; what neither would hold is how many steps and rescales there were, and the base learning
rates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer

from scalora.saving.errors import StateError

COUNTS = "scalora"
"""The entry of the optimizer's state dict."""


class CountsInOptimizer:
    """Adds an entry to an optimizer's state dicts, and takes it out of those that the optimizer loads.

    Args:
        optimizer: the optimizer.
        counts: gives the entry, of numbers and strings, when the optimizer is saved.
        check: called with an entry before the optimizer changes anything; raises if it is another run's.
        restore: called with the entry after the optimizer has loaded the state dict that it was in.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        counts: Callable[[], dict[str, Any]],
        check: Callable[[Mapping[str, Any]], None],
        restore: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._counts, self._check, self._restore = counts, check, restore
        self._loading: Mapping[str, Any] | None = None
        self._hooks = (
            optimizer.register_state_dict_post_hook(self._add),
            optimizer.register_load_state_dict_pre_hook(self._take),
            optimizer.register_load_state_dict_post_hook(self._after_loading),
        )

    def remove(self) -> None:
        """Leave the optimizer's state dicts as they are from now on."""
        for hook in self._hooks:
            hook.remove()

    def _add(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, COUNTS: self._counts()}

    def _take(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        self._loading = state.get(COUNTS)
        if self._loading is not None:
            if not isinstance(self._loading, Mapping) or not {"config", "step", "rescales"} <= self._loading.keys():
                raise StateError(f"the optimizer's state is damaged: its {COUNTS!r} is {self._loading!r}")
            self._check(self._loading)
        return {key: value for key, value in state.items() if key != COUNTS}

    def _after_loading(self, optimizer: Optimizer) -> None:
        if self._loading is not None:
            self._restore(self._loading)
            self._loading = None
