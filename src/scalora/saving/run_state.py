"""What every process of a run saves and loads: the state, as one file or as shards, and its own random numbers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from scalora.parallel.job import from_first
from scalora.parallel.processes import failing_together, process_rank
from scalora.saving.files import atomic_folder
from scalora.saving.random_state import random_file, random_files, random_state
from scalora.saving.shard_files import SHARDS, write_shards
from scalora.saving.state_file import (
    SHARDED_STATE,
    STATE_FILE,
    check_state,
    read_state,
    split_tensors,
    state_path,
    write_state,
)


def write_whole(folder: Path, state: Mapping[str, Any], step: int) -> None:
    """Write a state as one file; a process that is not the first writes its random numbers beside it.

    Args:
        folder: the folder; created if it does not exist.
        state: the state, in the first process.
        step: the number of steps taken.

    Raises:
        OSError: the files can't be written; earlier ones are unchanged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if rank := process_rank():
        write_state(random_file(folder, rank), {"step": step, "random": random_state()})
        return
    write_state(folder / STATE_FILE, state)
    if (folder / SHARDED_STATE / STATE_FILE).is_file():  # of an earlier state
        shutil.rmtree(folder / SHARDED_STATE)


def write_sharded(folder: Path, state: Mapping[str, Any], step: int) -> None:
    """Write a state as a folder of shards, each process its own: whole or not at all. All processes must take part.

    Args:
        folder: the folder to write it in, which all processes see; created if it does not exist.
        state: the state, with tensors that are split over processes.
        step: the number of steps taken.

    Raises:
        OSError: a process can't write. An earlier state is unchanged.
        StateError: not all shards are where the first process looks: the processes see different file systems.
    """
    rank = process_rank()
    with ExitStack() as renaming:
        place = None
        with failing_together(OSError):
            if rank == 0:
                place = renaming.enter_context(atomic_folder(folder / SHARDED_STATE, replace=True))
        partial: Path = from_first(place)
        write_shards(partial / SHARDS, dict(split_tensors(state)))
        with failing_together(OSError):
            if rank:
                write_state(random_file(partial, rank), {"step": step, "random": random_state()})
            else:
                write_state(partial / STATE_FILE, state)
                check_state(partial)
        with failing_together(OSError):
            renaming.close()
            if rank == 0:  # an earlier state in one file
                for path in (folder / STATE_FILE, *random_files(folder)):
                    path.unlink(missing_ok=True)


def read_own(folder: Path, like: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Read a state, with this process's random numbers if there are any of the same step.

    Args:
        folder: the folder.
        like: as in `read_state`.

    Raises:
        StateError: there is no state, or it is damaged.
    """
    state = read_state(folder, like)
    own = random_file(state_path(folder).parent, process_rank())
    if "random" in state and process_rank() and own.is_file():
        of_process = read_state(own)
        # A run that is killed while it saves one file may leave files of two steps behind.
        if of_process.get("step") == state.get("step"):
            state["random"] = of_process.get("random")
    return state


def shards_to_be_like(tensors: Mapping[str, Tensor], optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """What the tensors of a run's state are split like, by the names that `read_state` takes.

    Args:
        tensors: those of `scalora.saving.state.gather`.
        optimizer: the optimizer, whose state is split as its parameters are.
    """
    for name, tensor in tensors.items():
        yield f"/tensors/{name}", tensor
    for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        yield f"/optimizer/state/{number}", parameter
