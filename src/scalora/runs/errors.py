"""`InputError`: an error in the user's input, which the command line shows in one line."""


class InputError(ValueError):
    """Something that the user provided can't be used. The message names it and says what to do."""
