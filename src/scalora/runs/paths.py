"""Paths in a config: ``~`` and environment variables stand for what they stand for in a shell, in every key alike."""

from __future__ import annotations

import os
import re


def expanded(text: str) -> str:
    """A path, hub id or file name with ``~`` and the environment's variables replaced.

    Args:
        text: the text of the config. One that names an existing file or folder is not searched for variables.

    Raises:
        ValueError: there is no such user or variable. The folder would otherwise be called by the mark itself.
    """
    path = text
    if not os.path.exists(text):
        path = os.path.expandvars(text)
        if unknown := re.search(r"\$(\w+|\{\w+\})", path):
            raise ValueError(f"the environment has no variable {unknown[1].strip('{}')}")
    if not path.startswith("~"):
        return path
    path = os.path.expanduser(path)
    if path.startswith("~"):
        raise ValueError(f"there is no user {path[1:].partition('/')[0]!r}; a name that begins with ~ is ./{text}")
    return path
