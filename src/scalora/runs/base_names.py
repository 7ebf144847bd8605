"""What the adapters of a run name as their base, and what to tell people if no name can be loaded."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from gguf import GGUFReader

from scalora.runs.errors import InputError
from scalora.runs.models import Source
from scalora.saving.base_name import BaseName, loadable_name

# Where a GGUF file says which model it was converted from. Its ``general.base_model`` is another one: the model that
# this one was trained from, with other weights.
_ORIGINS = (
    "general.source.huggingface.repository",
    "general.source.repo_url",
    "general.source.url",
    "general.repo_url",
    "general.url",
)

_ON_THE_HUB = re.compile(r"(?:https?://(?:www\.)?huggingface\.co/)?([\w.-]+/[\w.-]+?)(?:/tree/\w+)?/?")


class NamedBase(NamedTuple):
    """What an adapter names as its base.

    Attributes:
        base: the name; None: the one under which Transformers has loaded the base.
        note: what users of the adapter must know about it, in one sentence or two; None: nothing.
    """

    base: BaseName | None
    note: str | None


def named_base(source: Source, wanted: str | None = None) -> NamedBase:
    """What an adapter should name as its base.

    Args:
        source: where the base was loaded from.
        wanted: the name that the user wants. None: the best that is known.

    Raises:
        InputError: `wanted` is a path without a model.
    """
    if wanted is not None:
        name = loadable_name(wanted)
        if name is None:
            raise InputError(f"--base-name {wanted!r}: is neither a hub id nor a folder with a config.json")
        return NamedBase(BaseName(name), None)
    if source.gguf_file is None:
        return NamedBase(None, None)
    path = Path(os.path.abspath(source.name)) / source.gguf_file
    origin = origin_of_gguf(path)
    if origin is not None:
        return NamedBase(
            BaseName(origin),
            f"It was trained on the weights of the GGUF file `{path}`, and names `{origin}`, the model that the file "
            "says it was converted from.",
        )
    return NamedBase(
        BaseName(None),
        f"It names no base: it was trained on the GGUF file `{path}`, which PEFT can't load by name. Load the base "
        f"with `from_pretrained({str(path.parent)!r}, gguf_file={path.name!r})`, or name the model that the file was "
        "converted from with `scalora export --base-name`; llama.cpp's `convert_lora_to_gguf.py` wants that model's "
        "folder as `--base`.",
    )


def origin_of_gguf(path: Path) -> str | None:
    """The hub id of the model that a GGUF file was converted from, by the file's own metadata.

    Args:
        path: the file.

    Returns:
        The id; None if the file does not say it.
    """
    fields = GGUFReader(path).fields
    for key in _ORIGINS:
        text = fields[key].contents() if key in fields else None
        match = _ON_THE_HUB.fullmatch(text.strip()) if isinstance(text, str) else None
        if match and not match[1].lower().endswith("gguf"):  # else the repository that holds such files
            return match[1]
    return None
