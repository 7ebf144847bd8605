"""The file of a state: one safetensors file, with everything that is not a tensor as JSON in its metadata.

A single file can be replaced atomically, and reading it executes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from scalora.saving.errors import StateError
from scalora.saving.files import atomic_write

FORMAT_VERSION = 1
"""Version of the file format that is written, and the only one that is read."""

STATE_FILE = "scalora_state.safetensors"
"""Name of the file in its folder."""

_METADATA = "scalora"


def write_state(path: Path, content: Mapping[str, Any]) -> None:
    """Write a tree of dicts, lists, tuples, numbers, strings and tensors to one file, atomically.

    Args:
        path: the file to write, in a folder that exists; replaced if it exists.
        content: the tree.

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


def read_state(path: Path) -> dict[str, Any]:
    """Read what `write_state` wrote.

    Args:
        path: the file, or the folder with it.

    Returns:
        The tree, with its tensors on the CPU.

    Raises:
        StateError: the file does not exist, is not a complete safetensors file, was not written by scalora, or has
            another format version.
    """
    described, tensors = _open(path)
    try:
        content = _rebuild(described, tensors)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise StateError(f"{str(path)!r} is damaged: its description does not fit its tensors ({error})") from None
    if not isinstance(content, dict):
        raise StateError(f"{str(path)!r} is damaged: its description is not a dict")
    return content


def check_state(path: Path) -> None:
    """Check a state file without reading its tensors, which is enough to find truncated files.

    Args:
        path: the file, or the folder with it.

    Raises:
        StateError: the file does not exist, is not a complete safetensors file, was not written by scalora, or has
            another format version.
    """
    _open(path)


def _open(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """The description and the tensors of a state file. The tensors are memory-mapped and read when they are used."""
    path = path / STATE_FILE if path.is_dir() else path
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
    if kind == "table":
        return {key: _rebuild(value, tensors) for key, value in content}
    if kind in ("list", "tuple"):
        return (tuple if kind == "tuple" else list)(_rebuild(value, tensors) for value in content)
    if kind == "value":
        return content
    raise ValueError(f"unknown kind {kind!r}")
