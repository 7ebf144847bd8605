"""What an adapter says its base is (PEFT's ``base_model_name_or_path``): a name that others can load, or none."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard
from peft import PeftModel
from peft.utils import CONFIG_NAME as PEFT_CONFIG_NAME

from scalora.saving.files import atomic_write

_CARD = "README.md"  # PEFT's model card

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

_TAG = "base_model:adapter:"  # what PEFT puts before the name in the tags of its model card


class BaseName(NamedTuple):
    """The base that an adapter names.

    Attributes:
        name: hub id, or absolute path of a folder with a ``config.json``. None: there is no name that can be loaded.
        revision: commit or branch of a model on the hub. None: the newest.
    """

    name: str | None
    revision: str | None = None


def loadable_name(name: str | None) -> str | None:
    """The name under which ``from_pretrained`` finds a model from any working directory.

    Args:
        name: what a model, a config or a user calls it.

    Returns:
        A hub id as it is, and a folder with a ``config.json`` as an absolute path. None for anything else: no name, a
        path that does not exist, or a folder without a ``config.json``, such as that of a GGUF file.
    """
    if not name:
        return None
    folder = Path(name).expanduser()
    if folder.is_dir():
        return os.path.abspath(folder) if (folder / "config.json").is_file() else None
    return name if _HUB_ID.fullmatch(name) and not name.endswith(".gguf") and not folder.exists() else None


def flaw_of_name(name: str | None) -> str | None:
    """Why others will not find the base that an adapter names, as far as can be told here.

    Args:
        name: the name.

    Returns:
        A clause about the adapter, with what to do; None if nothing is known to be wrong.
    """
    if name is None:
        return "names no base: tools that load it by name can't; name one when you export it"
    if loadable_name(name) is None:
        return f"names {name!r} as its base, which is neither a hub id nor a folder with a config.json: name another"
    temporary = Path(tempfile.gettempdir()).resolve()
    if os.path.isabs(name) and temporary in Path(name).resolve().parents:
        return f"names {name!r} as its base, which lies among temporary files: keep it elsewhere, or name another base"
    return None


def base_name(model: PeftModel, adapter: str) -> BaseName:
    """What to name as the base of a model's adapter.

    A model from the hub is pinned to the commit that was loaded: the adapter fits no other weights.

    Args:
        model: the PEFT model.
        adapter: name of the adapter, whose configuration names the base.
    """
    config = model.peft_config[adapter]
    own = getattr(model.get_base_model(), "name_or_path", None)
    name = loadable_name(own) or loadable_name(config.base_model_name_or_path)
    if name is None or os.path.isabs(name):
        return BaseName(name)
    commit = getattr(getattr(model.get_base_model(), "config", None), "_commit_hash", None)
    return BaseName(name, config.revision or (commit if name == own else None))


def write_base_name(folder: Path, base: BaseName, note: str | None = None) -> None:
    """Replace the base that a written adapter names, in its configuration and in PEFT's model card.

    Args:
        folder: the adapter's folder, as PEFT has written it.
        base: the name to write.
        note: text for the top of the model card.

    Raises:
        OSError: a file can't be written.
    """
    path = folder / PEFT_CONFIG_NAME
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base.name, "revision": base.revision}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    if not (folder / _CARD).is_file():
        return
    card = ModelCard.load(folder / _CARD)
    tags = [tag for tag in card.data.tags or [] if not tag.startswith(_TAG)]
    # The hub takes only its own ids as names of a base.
    listed = base.name if base.name and not os.path.isabs(base.name) else None
    card.data.base_model = listed
    card.data.tags = sorted([*tags, _TAG + listed] if listed else tags) or None
    if note is not None:
        card.text = f"\n{note}\n{card.text}"
    with atomic_write(folder / _CARD) as temporary:
        temporary.write_text(str(card), encoding="utf-8")
