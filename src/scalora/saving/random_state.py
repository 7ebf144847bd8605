"""The random number generators of a process: their states as plain data, and back."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, cast

import numpy
import torch
from torch import Tensor

from scalora.saving.errors import StateError, short_repr


def random_state() -> dict[str, Any]:
    """The states of the random number generators of Python, NumPy, torch and its accelerators."""
    name, keys, *position = cast(tuple[Any, ...], numpy.random.get_state(legacy=True))
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype("int64")), *position),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def check_random_state(state: Any) -> None:
    """Raise `StateError` if `set_random_state` can't set a state."""
    try:
        random.Random().setstate(state["python"])
        numpy.random.RandomState().set_state(_numpy_state(state))
        for generator in (state["torch"], *state["cuda"]):
            if not isinstance(generator, Tensor):
                raise TypeError(f"{short_repr(generator)} is not a generator's state")
        torch.Generator().set_state(state["torch"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise StateError(f"the state's random number generators can't be set: {error}") from None


def set_random_state(state: Mapping[str, Any]) -> None:
    """The inverse of `random_state`."""
    random.setstate(state["python"])
    numpy.random.set_state(_numpy_state(state))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _numpy_state(state: Mapping[str, Any]) -> tuple[Any, ...]:
    name, keys, *position = state["numpy"]
    return (name, keys.numpy().astype("uint32"), *position)
