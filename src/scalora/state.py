"""What makes a trained model out of its base: gathered, tied to that base, written whole, read back exactly.

The file is one safetensors file; everything that is not a tensor is JSON in its metadata. So it is there or not there,
and reading it executes nothing.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, cast

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from scalora.adapters import LoraPair
from scalora.config import ScaLoraConfig
from scalora.remainder import DenseRemainder
from scalora.writing import whole_file

FORMAT_VERSION = 1
STATE_FILE = "scalora_state.safetensors"

_METADATA = "scalora"

# What every state holds, and of which types.
_ENTRIES: dict[str, tuple[type, ...]] = {
    "base": (str,),
    "adapter": (dict, NoneType),
    "merge": (str,),
    "config": (dict, NoneType),
    "step": (int,),
    "rescales": (int,),
    "tensors": (dict,),
}

# Entries of each weight that the fingerprint looks at, spread evenly: any training step changes nearly all entries, so
# a few of each are enough to tell two models apart, at no cost even for the largest.
_SAMPLES = 64


class StateError(ValueError):
    """A saved state can't be used: missing, damaged, of another format or of another base; the message says which."""


def base_fingerprint(model: nn.Module) -> str:
    """Identifies what is frozen under a PEFT model: a SHA-256 over a sample of each tensor, its name, shape and dtype.

    Take it before the first change to the base. Trained parameters and what PEFT put beside them do not count.
    """
    # The tensors of the state dict and not the parameters themselves: bitsandbytes keeps a 4-bit weight in another
    # layout once a CPU has used it for inference.
    tensors = model.state_dict()
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        # PEFT keeps the head that it trains a copy of; a new head is random and differs from one load to the next.
        if parameter.requires_grad or ".original_module." in name:
            continue
        tensor = tensors[name]
        flat = tensor.reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].contiguous().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def gather(model: nn.Module, pairs: list[LoraPair]) -> dict[str, Tensor]:
    """All tensors that training changes, by name, not copied.

    ``trained.NAME`` for every trained parameter (both factors, and heads or biases trained beside them), and for each
    layer its remainder: ``weight.NAME`` (and ``rounded_off.NAME``) where it is dense, ``left.NAME`` and ``right.NAME``
    where it is factored.
    """
    tensors = {f"trained.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for pair in pairs:
        if isinstance(pair.remainder, DenseRemainder):
            tensors[f"weight.{pair.name}"] = pair.weight.detach()
        tensors |= {f"{key}.{pair.name}": value for key, value in pair.remainder.state_dict().items()}
    return tensors


def check_content(state: Mapping[str, Any]) -> None:
    """See to it that a state has what every state has.

    Raises:
        StateError: an entry is missing, or is not what it should be.
    """
    if missing := sorted(_ENTRIES.keys() - state.keys()):
        raise StateError(f"not a ScaLoRA state: it lacks {', '.join(missing)}")
    for key, types in _ENTRIES.items():
        value = state[key]
        if not isinstance(value, types):
            raise StateError(f"the state is damaged: its {key!r} is {shortened(value)}")
        if isinstance(value, int) and (isinstance(value, bool) or value < 0):
            raise StateError(f"the state is damaged: its {key!r} is {value}, not a count")
    if state["merge"] not in ("dense", "factored"):
        raise StateError(f"the state is damaged: its 'merge' is {state['merge']!r}, neither 'dense' nor 'factored'")
    for name, value in state["tensors"].items():
        if not isinstance(value, Tensor):
            raise StateError(f"the state is damaged: {name!r} is {shortened(value)}, not a tensor")


def shortened(value: Any, length: int = 40) -> str:
    """A value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}…"


def check_base(state: Mapping[str, Any], fingerprint: str) -> None:
    """Raise `StateError` if a state belongs to another base than that with the fingerprint."""
    if state["base"] != fingerprint:
        raise StateError(
            f"the state belongs to a base model with fingerprint {state['base'][:12]}, this one has "
            f"{fingerprint[:12]}: load the base that the run started from, in the same dtype, and adapt "
            "the same modules of it"
        )


def saved_config(state: Mapping[str, Any]) -> ScaLoraConfig | None:
    """The settings that a state was saved with; None if it was saved before an engine was attached.

    Raises:
        StateError: they are not settings of this scalora.
    """
    if state["config"] is None:
        return None
    try:
        return ScaLoraConfig.from_dict(state["config"])
    except (TypeError, ValueError) as error:
        raise StateError(f"the state's settings can't be used: {error}") from None


def check_fit(model: nn.Module, pairs: list[LoraPair], tensors: Mapping[str, Tensor]) -> None:
    """See to it that gathered tensors can be put back in a model.

    Raises:
        StateError: a tensor is missing, unknown, of another shape or dtype, or not finite.
    """
    expected = gather(model, pairs)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise StateError(f"the state lacks {missing[0]!r} ({len(missing)} missing): it is of another model or adapter")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise StateError(
            f"the state has {unknown[0]!r} ({len(unknown)} unknown), which the model has not: it is of another "
            "adapter, or of another merge setting"
        )
    for name, saved in tensors.items():
        wanted = expected[name]
        if name.startswith(("left.", "right.")):  # with as many columns as there were
            fits = saved.ndim == 2 and len(saved) == len(wanted)
        else:
            fits = saved.shape == wanted.shape
        if not fits or saved.dtype != wanted.dtype:
            raise StateError(
                f"{name!r} is {saved.dtype} {tuple(saved.shape)} in the state and {wanted.dtype} "
                f"{tuple(wanted.shape)} in the model"
            )
        if not saved.isfinite().all():
            raise StateError(f"{name!r} in the state has NaN or infinite entries")
    for pair in pairs:
        if (left := tensors.get(f"left.{pair.name}")) is not None and (
            left.shape[1] != tensors[f"right.{pair.name}"].shape[1]
        ):
            raise StateError(f"the factors of {pair.name!r} have different numbers of columns")


def restore(model: nn.Module, pairs: list[LoraPair], tensors: Mapping[str, Tensor]) -> None:
    """Put gathered tensors, of which `check_fit` has found nothing, back in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(tensors[f"trained.{name}"])
        for pair in pairs:
            if isinstance(pair.remainder, DenseRemainder):
                pair.weight.copy_(tensors[f"weight.{pair.name}"])
            keys = pair.remainder.state_dict().keys()
            pair.remainder.load_state_dict({key: tensors[f"{key}.{pair.name}"] for key in keys})


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
                raise TypeError(f"{shortened(generator)} is not a generator's state")
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


def write_state(path: Path, content: Mapping[str, Any]) -> None:
    """Write a tree of dicts, lists, tuples, numbers, texts and tensors to one file, atomically.

    Raises:
        OSError: the disk is full, the folder is read-only, …; whatever was at `path` before is still there.
    """
    tensors: dict[str, Tensor] = {}
    seen: dict[tuple[Any, ...], str] = {}
    described = _describe(content, "", tensors, seen)
    metadata = {_METADATA: json.dumps({"format_version": FORMAT_VERSION, "content": described}), "format": "pt"}
    with whole_file(path) as temporary:
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
