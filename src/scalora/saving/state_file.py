"""The file of a state: one safetensors file, with everything that is not a tensor as JSON in its metadata.

A single file can be replaced atomically, and reading it executes nothing. The state of a sharded run may be a folder
instead, `scalora.saving.shard_files`: this file in it, and the shards beside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from scalora.model.layers import is_distributed
from scalora.saving.errors import StateError
from scalora.saving.files import atomic_write
from scalora.saving.shard_files import SHARDS, Shards, check_shards, read_shards

FORMAT_VERSION = 1
"""Version of the file format that is written, and the only one that is read."""

STATE_FILE = "scalora_state.safetensors"
"""Name of the file in its folder."""

SHARDED_STATE = "scalora_state"
"""Name of the folder with the file and the shards of a sharded run, in the place of the file."""

_METADATA = "scalora"


def holds_state(folder: Path) -> bool:
    """Whether there is a state in a folder, as one file or as shards, damaged or not.

    Args:
        folder: the folder; need not exist.
    """
    return os.path.lexists(folder / STATE_FILE) or (folder / SHARDED_STATE / STATE_FILE).exists()


def state_path(folder: Path) -> Path:
    """The file of a state in a folder: the one in the folder of shards if there is only that.

    Args:
        folder: the folder.
    """
    within = folder / SHARDED_STATE / STATE_FILE
    return within if within.is_file() and not os.path.lexists(folder / STATE_FILE) else folder / STATE_FILE


def states_below(folder: Path, pattern: str) -> set[Path]:
    """Folders that hold a state.

    Args:
        folder: the folder to look in.
        pattern: what folders to look for, such as ``"checkpoint-*"``.
    """
    return {below for below in folder.glob(pattern) if holds_state(below)}


def holds_any_state(folder: Path) -> bool:
    """Whether a folder holds a state, in itself or in a checkpoint.

    Args:
        folder: the folder; need not exist.
    """
    return holds_state(folder) or bool(states_below(folder, "checkpoint-*"))


def write_state(path: Path, content: Mapping[str, Any]) -> None:
    """Write a tree of dicts, lists, tuples, numbers, strings and tensors to one file, atomically.

    Args:
        path: the file to write, in a folder that exists; replaced if it exists.
        content: the tree. Of tensors that are split over processes it gets names and shapes.

    Raises:
        OSError: the file can't be written; an earlier one is unchanged.
        StateError: the tree holds something else.
    """
    tensors: dict[str, Tensor] = {}
    seen: dict[tuple[Any, ...], str] = {}
    described = _describe(content, "", tensors, seen)
    metadata = {_METADATA: json.dumps({"format_version": FORMAT_VERSION, "content": described}), "format": "pt"}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def split_tensors(content: Any, key: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a tree that are split over processes, by the names that `write_state` gives them.

    Args:
        content: the tree.
        key: the name of the tree itself.
    """
    if isinstance(content, Mapping):
        for name, value in content.items():
            yield from split_tensors(value, f"{key}/{name}")
    elif isinstance(content, (list, tuple)):
        for i, value in enumerate(content):
            yield from split_tensors(value, f"{key}/{i}")
    elif isinstance(content, Tensor) and is_distributed(content):
        yield key, content


def read_state(path: Path, like: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Read what `write_state` wrote, and the shards beside it.

    Args:
        path: the file, or the folder with it.
        like: tensors that are split over processes, by the names of `split_tensors`, or by these without their last
            part: what was saved as shards and has their shape is split in the same way, and each process reads its
            part. None: all tensors are read whole.

    Returns:
        The tree, with its tensors on the CPU.

    Raises:
        StateError: the file does not exist, is not a complete safetensors file, was not written by scalora, or has
            another format version; or shards are missing or damaged.
    """
    path = state_path(path) if path.is_dir() else path
    described, tensors = _open(path)
    try:
        tensors |= read_shards(path.parent / SHARDS, _shards_in(described), like or {})
        content = _rebuild(described, tensors)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise StateError(f"{str(path)!r} is damaged: its description does not fit its tensors ({error})") from None
    if not isinstance(content, dict):
        raise StateError(f"{str(path)!r} is damaged: its description is not a dict")
    return content


def check_state(path: Path) -> None:
    """Check a state without reading its tensors, which is enough to find truncated files and missing shards.

    Args:
        path: the file, or the folder with it.

    Raises:
        StateError: the file does not exist, is not a complete safetensors file, was not written by scalora, or has
            another format version; or shards are missing or damaged.
    """
    path = state_path(path) if path.is_dir() else path
    described, _ = _open(path)
    try:
        check_shards(path.parent / SHARDS, _shards_in(described))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise StateError(f"{str(path)!r} is damaged: its description does not fit its tensors ({error})") from None


def _open(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """The description and the tensors of a state file. The tensors are memory-mapped and read when they are used."""
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise StateError(f"{str(path)!r} {what}: give the folder of a ScaLoRA state, which holds {STATE_FILE}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise StateError(f"{str(path)!r} is not a complete safetensors file: {error}") from None
    try:
        described = json.loads(metadata[_METADATA])
        version, content = described["format_version"], described["content"]
    except (KeyError, RecursionError, TypeError, ValueError):
        raise StateError(f"{str(path)!r} is a safetensors file, but was not written by scalora") from None
    if version != FORMAT_VERSION:
        raise StateError(f"{str(path)!r} has format version {version!r}, but this scalora reads {FORMAT_VERSION}")
    return content, tensors


def _describe(value: Any, key: str, tensors: dict[str, Tensor], seen: dict[tuple[Any, ...], str]) -> Any:
    """JSON of a value. Tensors are moved to `tensors` and replaced by their names; shared ones are stored once."""
    if isinstance(value, Tensor) and is_distributed(value):
        return {"shards": Shards.of(key, value)._asdict()}
    if isinstance(value, Tensor):
        identity = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        name = seen.setdefault(identity, key) if value.numel() else key
        if name == key:
            tensors[name] = value.detach().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"table": [[k, _describe(v, f"{key}/{k}", tensors, seen)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_describe(v, f"{key}/{i}", tensors, seen) for i, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise StateError(f"the state holds a {type(value).__name__} at {key!r}, which can't be saved")


def _rebuild(described: Any, tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = described.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "shards":
        return tensors[content["name"]]
    if kind == "table":
        return {key: _rebuild(value, tensors) for key, value in content}
    if kind in ("list", "tuple"):
        return (tuple if kind == "tuple" else list)(_rebuild(value, tensors) for value in content)
    if kind == "value":
        return content
    raise ValueError(f"unknown kind {kind!r}")


def _shards_in(described: Any) -> list[Shards]:
    """The tensors of a description that are not in its file."""
    ((kind, content),) = described.items()
    if kind == "shards":
        return [Shards(str(content["name"]), [int(size) for size in content["shape"]], str(content["dtype"]))]
    if kind == "table":
        return [shards for _, value in content for shards in _shards_in(value)]
    if kind in ("list", "tuple"):
        return [shards for value in content for shards in _shards_in(value)]
    return []
