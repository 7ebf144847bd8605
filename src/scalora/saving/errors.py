"""`StateError`, and values in error messages."""

from __future__ import annotations

from typing import Any


class StateError(ValueError):
    """A saved state can't be used: it is missing, damaged, of another format or for another base (see the message)."""


def short_repr(value: Any, length: int = 40) -> str:
    """``repr(value)``, truncated for an error message.

    Args:
        value: any value.
        length: maximum number of characters.
    """
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}…"
