"""beartype, as jaxtyping's import hook takes it (`--jaxtyping-packages` in pyproject.toml)."""

import functools
import random

from beartype import beartype


def checked(function):
    """Check the types of a call without drawing from the global generator, whose state some tests compare.

    beartype looks at a random item of each list. jaxtyping gives this only functions with an empty body.
    """
    check = beartype(function)
    if random.getrandbits not in (check.__kwdefaults__ or {}).values():
        return check  # of no list: reading and restoring the state would take longer than the check

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        state = random.getstate()
        try:
            return check(*args, **kwargs)
        finally:
            random.setstate(state)

    return wrapper
