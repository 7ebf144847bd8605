"""A command that is run as several processes, as torchrun starts them: the first writes and speaks for all of them.

Torch is imported only where it is needed, so that a command answers at once.
"""

from __future__ import annotations

import os
import time
from typing import Any

# Longer than the first process takes to meet the same mistake and to end, after which a launcher ends the others.
_LAUNCHER_SECONDS = 15.0


def is_first() -> bool:
    """Whether this process is the first of its job, or the only one, also before they have found each other."""
    return os.environ.get("RANK", "0") == "0"


def let_the_first_speak() -> None:
    """Before a process that is not the first prints its error: wait for the launcher to end it.

    A mistake that all processes meet is then printed once, by the first. One that only this process meets is printed
    by this process, because nothing ends it while it waits.
    """
    if not is_first():
        time.sleep(_LAUNCHER_SECONDS)


def wait_for_all() -> None:
    """Wait until every process of the job is here."""
    import torch.distributed as dist

    from scalora.parallel.processes import have_a_group

    if have_a_group():
        dist.barrier()


def from_first(value: Any) -> Any:
    """The value that the first process has, for a decision that all must share.

    Args:
        value: what this process would decide; any object that can be pickled.
    """
    import torch.distributed as dist

    from scalora.parallel.processes import have_a_group

    if not have_a_group():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]
