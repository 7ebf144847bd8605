"""The shards of a sharded run's state, written and read by torch.distributed.checkpoint: each process its own.

They are safetensors files, with the places of the shards in their headers. DCP's own format has a pickle beside them,
which a file from elsewhere could make execute anything. Any number of processes reads them, each what it needs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scalora.model.layers import is_distributed
from scalora.parallel.shards import local
from scalora.saving.errors import StateError

SHARDS = "shards"
"""Name of the folder with the shards, beside the file with the rest of the state."""

# DCP builds a file in memory before it writes it, so a process needs at most this much besides its shards.
_FILE_BYTES = 1 << 30


class Shards(NamedTuple):
    """A tensor that is split over files.

    Attributes:
        name: its name in them.
        shape: the whole tensor's shape.
        dtype: the name of its dtype.
    """

    name: str
    shape: list[int]
    dtype: str

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Shards:
        """The description of a tensor.

        Args:
            name: its name in the files.
            tensor: the tensor.
        """
        return cls(name, list(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors that are split over processes, each process its shards. All processes must take part.

    Args:
        folder: the folder; created if it does not exist.
        tensors: the tensors by name, the same ones in all processes.

    Raises:
        OSError: a process could not write; raised in all of them.
    """
    # Here, because they take long to import, and few runs are sharded.
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    file_of, used = {}, 0
    for name, tensor in tensors.items():
        used += local(tensor).nbytes
        file_of[name] = 1 + used // _FILE_BYTES
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=file_of, save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        failures = [f"process {rank}: {wrapped[0]}" for rank, wrapped in sorted(error.failures.items())]
        raise OSError(f"the shards can't be written to {str(folder)!r}: {'; '.join(failures)}") from None


def read_shards(folder: Path, shards: Sequence[Shards], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read tensors that `write_shards` wrote, without communication.

    Args:
        folder: the folder.
        shards: the tensors to read.
        like: tensors that are split over processes, by the names of those that are to be split in the same way, or by
            these without their last part.

    Returns:
        The tensors on the CPU by name: the part of this process where there is one of the same shape to be like.

    Raises:
        StateError: files are missing or damaged.
    """
    if not shards:
        return {}
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    check_shards(folder, shards)
    found = {}
    for name, shape, dtype in shards:
        model = like.get(name, like.get(name.rpartition("/")[0]))
        kind = getattr(torch, dtype)
        if model is not None and is_distributed(model) and list(model.shape) == shape:
            found[name] = torch.empty_like(model, dtype=kind, device="cpu", requires_grad=False)
        else:
            found[name] = torch.empty(shape, dtype=kind)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each process reads alone
            load(found, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except (CheckpointException, Exception) as error:  # whatever a damaged file leads to
        raise _damaged(folder, error) from None
    return found


def check_shards(folder: Path, shards: Sequence[Shards]) -> None:
    """Check that tensors are whole in the shards of a folder, without reading them.

    Args:
        folder: the folder.
        shards: the tensors.

    Raises:
        StateError: files are missing or damaged.
    """
    if not shards:
        return
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        saved: dict[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except Exception as error:  # whatever a damaged file leads to
        raise _damaged(folder, error) from None
    for name, shape, dtype in shards:
        # Where no shard overlaps another, which no file of a whole checkpoint does.
        there = sum(math.prod(chunk.sizes) for chunk in saved[name].chunks) if name in saved else 0
        if there != math.prod(shape):
            raise StateError(
                f"{str(folder)!r} has {there} of {math.prod(shape)} entries of {name!r}: files of shards are missing"
            )
        if list(saved[name].size) != shape or saved[name].properties.dtype != getattr(torch, dtype):
            raise StateError(f"{str(folder)!r} has {name!r} in another shape or dtype than it says")


def _damaged(folder: Path, error: BaseException) -> StateError:
    text = str(error).strip().splitlines()
    return StateError(f"the shards in {str(folder)!r} are damaged: {type(error).__name__} {text[-1] if text else ''}")
