"""Errors that the command shows as one line."""


class InputError(ValueError):
    """What the user gave can't be used; the message names it and says what to do."""
