"""The file of a state: one safetensors file whose metadata holds, as JSON, everything that is not a tensor.

So it is there or not there, and reading it executes nothing.
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
STATE_FILE = "scalora_state.safetensors"

_METADATA = "scalora"


def write_state(path: Path, content: Mapping[str, Any]) -> None:
    """Write a tree of dicts, lists, tuples, numbers, texts and tensors to one file, atomically.

    Raises:
        OSError: the disk is full, the folder is read-only, …; whatever was at `path` before is still there.
    """
    tensors: dict[str, Tensor] = {}
    seen: dict[tuple[Any, ...], str] = {}
    described = _describe(content, "", tensors, seen)
    metadata = {_METADATA: json.dumps({"format_version": FORMAT_VERSION, "content": described}), "format": "pt"}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_state(path: Path) -> dict[str, Any]:
    """Read what `write_state` wrote; tensors come on the CPU.

    Args:
        path: the file, or the folder that it is in.

    Raises:
        StateError: there is no such file, it leads out of its folder, is no safetensors file, is cut short, or is of
            another format version.
    """
    described, tensors = _open(path)
    try:
        content = _rebuild(described, tensors)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise StateError(f"{str(path)!r} is damaged: its description does not fit its tensors ({error})") from None
    if not isinstance(content, dict):
        raise StateError(f"{str(path)!r} is damaged: its description is not a table")
    return content


def check_state(path: Path) -> None:
    """Raise what `read_state` would, short of reading the tensors: enough to find a file that was cut short."""
    _open(path)


def _open(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """The description and the tensors of a state file; the tensors are mapped, not read, until they are used."""
    path = path / STATE_FILE if path.is_dir() else path
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise StateError(f"{str(path)!r} {what}: give the folder of a ScaLoRA state, with its {STATE_FILE}")
    if path.resolve().parent != path.parent.resolve():
        raise StateError(f"{str(path)!r} is a link out of its folder: copy the file itself")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise StateError(f"{str(path)!r} is not a whole safetensors file: {error}") from None
    try:
        described = json.loads(metadata[_METADATA])
        version, content = described["format_version"], described["content"]
    except (KeyError, RecursionError, TypeError, ValueError):
        raise StateError(f"{str(path)!r} is a safetensors file, but not one that scalora wrote") from None
    if version != FORMAT_VERSION:
        raise StateError(f"{str(path)!r} has format version {version!r}, this scalora reads {FORMAT_VERSION}")
    return content, tensors


def _describe(value: Any, key: str, tensors: dict[str, Tensor], seen: dict[tuple[Any, ...], str]) -> Any:
    """JSON for a value, with each tensor moved to `tensors` and named in its place; one storage is written once."""
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
