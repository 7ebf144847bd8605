"""Reading YAML files, and the ``--key value`` words of a command line that override their keys."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from scalora.runs.errors import InputError

_BOOL = "tag:yaml.org,2002:bool"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text and no as false; people mean the number, and ``save_strategy: no`` the word."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the parent's attribute
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(_BOOL, re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: Path, kind: str) -> dict[str, Any]:
    """The keys and values of a YAML file; empty for an empty file.

    Args:
        path: path of the file.
        kind: name of the kind of file for error messages: ``"config"`` or ``"study"``.

    Raises:
        InputError: the file is missing, is not YAML, or is not a mapping.
    """
    if not path.is_file():
        raise InputError(f"{kind} file {str(path)!r} does not exist")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{kind} file {str(path)!r} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{kind} file {str(path)!r} must hold keys and values, not a {type(content).__name__}")
    return content


def parsed_overrides(words: Sequence[str], options: Sequence[str] = ()) -> list[tuple[str, Any]]:
    """Parse the words ``--key value`` and ``--key=value`` into dotted keys and YAML values.

    Args:
        words: the words of the command line that are left over when its options have been parsed.
        options: the options of the command, such as ``"--overwrite"``, to suggest for a mistyped one.

    Raises:
        InputError: a word is not a key, a key has no value, or a value is not YAML.
    """
    pairs = []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--"):
            raise InputError(f"expected --key value, got {word!r}")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                near = difflib.get_close_matches(word, options, n=1)
                raise InputError(
                    f"unknown option {word!r}: did you mean {near[0]!r}?" if near else f"{word} needs a value"
                )
            value = remaining.pop(0)
        try:
            pairs.append((key.replace("-", "_"), yaml.load(value, _Loader)))
        except yaml.YAMLError as error:
            raise InputError(f"--{key} {value}: the value is not valid YAML: {error}") from None
    return pairs


def set_dotted(content: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a key of a config, creating the sections it lies in.

    Args:
        content: nested keys and values, modified in place.
        dotted: the key with its sections, such as ``"training.max_steps"``.
        value: the new value.

    Raises:
        InputError: a key on the way to it is not a section.
    """
    *sections, key = dotted.split(".")
    for section in sections:
        if content.get(section) is None:
            content[section] = {}
        content = content[section]
        if not isinstance(content, dict):
            raise InputError(f"--{dotted}: {section!r} is not a section")
    content[key] = value
