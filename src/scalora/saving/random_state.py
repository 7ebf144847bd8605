"""Saves and restores the states of a process's random number generators as plain data.

Each process of a run draws its own dropout masks, so each keeps its own states.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from torch import Tensor

from scalora.parallel.processes import process_count, process_rank
from scalora.saving.errors import StateError, short_repr


def random_state() -> dict[str, Any]:
    """The states of the random number generators of Python, NumPy, torch and CUDA, and which process's they are."""
    name, keys, *position = cast(tuple[Any, ...], numpy.random.get_state(legacy=True))
    return {
        "process": [process_rank(), process_count()],
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype("int64")), *position),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device) for device in _cuda_devices()],
    }


def random_file(folder: Path, rank: int) -> Path:
    """Where a process other than the first one saves the states of its generators.

    Args:
        folder: the folder of the run's state.
        rank: the number of the process, from 1.
    """
    return folder / f"scalora_random_{rank}.safetensors"


def random_files(folder: Path) -> list[Path]:
    """What `random_file` names, of all processes of a run.

    Args:
        folder: the folder of the run's state.
    """
    return sorted(folder.glob("scalora_random_*.safetensors"))


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
        rank, count = _process(state)
        if not 0 <= rank < count:
            raise ValueError(f"it is of process {rank} of {count}")
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise StateError(f"the random number generators in the state can't be restored: {error}") from None


def why_of_another_process(state: Mapping[str, Any]) -> str | None:
    """Why states are not this process's to restore: those of another process would repeat its random numbers.

    Args:
        state: states of the generators, from `random_state`.

    Returns:
        The reason; None if they are this process's.
    """
    rank, count = _process(state)
    if count != process_count():
        return f"the state was saved by {count} processes, and this run has {process_count()}"
    if rank != process_rank():
        return f"the folder has none for process {process_rank()}; call save() in every process"
    if (saved := len(state["cuda"])) not in (0, len(_cuda_devices())) and torch.cuda.is_available():
        return f"the state was saved with {saved} GPUs, and this process has {len(_cuda_devices())}"
    return None


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore the states of the random number generators of Python, NumPy, torch and, if available, CUDA.

    Args:
        state: states of the generators, from `random_state`.
    """
    random.setstate(state["python"])
    numpy.random.set_state(_numpy_state(state))
    torch.set_rng_state(state["torch"])
    for device, generator in zip(_cuda_devices(), state["cuda"], strict=False):
        torch.cuda.set_rng_state(generator, device)


def _process(state: Mapping[str, Any]) -> tuple[int, int]:
    """The process that states are of, and of how many. Earlier versions did not note it down."""
    rank, count = state.get("process", (0, 1))
    return int(rank), int(count)


def _cuda_devices() -> list[int]:
    """The GPUs whose generators a process uses: of several processes, each its own one."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.current_device()] if process_count() > 1 else list(range(torch.cuda.device_count()))


def _numpy_state(state: Mapping[str, Any]) -> tuple[Any, ...]:
    name, keys, *position = state["numpy"]
    return (name, keys.numpy().astype("uint32"), *position)
