"""Saves and restores the states of a process's random number generators as plain data."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, cast

import numpy
import torch
from torch import Tensor

from scalora.saving.errors import StateError, short_repr


def random_state() -> dict[str, Any]:
    """The states of the random number generators of Python, NumPy, torch and CUDA."""
    name, keys, *position = cast(tuple[Any, ...], numpy.random.get_state(legacy=True))
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype("int64")), *position),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def check_random_state(state: Any) -> None:
    """Check that `set_random_state` can restore a state. Sets nothing.

    Args:
        state: states of the generators, from `random_state` or a file.

    Raises:
        StateError: it can't be restored.
    """
    try:
        random.Random().setstate(state["python"])
        numpy.random.RandomState().set_state(_numpy_state(state))
        for generator in (state["torch"], *state["cuda"]):
            if not isinstance(generator, Tensor):
                raise TypeError(f"{short_repr(generator)} is not the state of a generator")
        torch.Generator().set_state(state["torch"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise StateError(f"the random number generators in the state can't be restored: {error}") from None


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore the states of the random number generators of Python, NumPy, torch and, if available, CUDA.

    Args:
        state: states of the generators, from `random_state`.
    """
    random.setstate(state["python"])
    numpy.random.set_state(_numpy_state(state))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _numpy_state(state: Mapping[str, Any]) -> tuple[Any, ...]:
    name, keys, *position = state["numpy"]
    return (name, keys.numpy().astype("uint32"), *position)
