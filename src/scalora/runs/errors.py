"""The errors that the command line shows in one line."""


class InputError(ValueError):
    """Something that the user provided can't be used. The message names it and says what to do."""


class DivergedError(RuntimeError):
    """Training has gone wrong: a loss, gradient or weight is NaN or infinite. The message says what to try.

    Args:
        message: the message.
        step: the step at which it went wrong.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step
