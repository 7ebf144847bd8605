"""beartype, as jaxtyping's import hook takes it (`--jaxtyping-packages` in pyproject.toml)."""

import functools
import random

from beartype import beartype


def checked(function):
    """Check the types of a call without drawing from the global generator, whose state some tests compare.

    beartype looks at a random item of each list. jaxtyping gives this only functions with an empty body.
    """
    check = beartype(function)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        state = random.getstate()
        try:
            return check(*args, **kwargs)
        finally:
            random.setstate(state)

    return wrapper
