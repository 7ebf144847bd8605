"""Names of folders and files for what people have named."""

from __future__ import annotations

import re


def slug(method: str) -> str:
    """The name of a folder or file for a method, test or task.

    Args:
        method: its name in the tables.
    """
    return re.sub(r"[^a-z0-9_.]+", "-", method.lower()).strip("-.")
