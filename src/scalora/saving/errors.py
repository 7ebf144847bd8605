"""`StateError`, and how an error message shows a value."""

from __future__ import annotations

from typing import Any


class StateError(ValueError):
    """A saved state can't be used: missing, damaged, of another format or of another base; the message says which."""


def short_repr(value: Any, length: int = 40) -> str:
    """``repr(value)``, cut off where it gets too long for an error message.

    Args:
        value: anything.
        length: characters that are kept.
    """
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}…"
