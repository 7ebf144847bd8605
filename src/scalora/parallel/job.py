"""A command that is run as several processes, as torchrun starts them: the first writes and speaks for all of them.

Torch is imported only where it is needed, so that a command answers at once.
"""

from __future__ import annotations

import os
import time
from typing import Any

# Longer than the first process takes to meet the same mistake and to end, after which a launcher ends the others.
_LAUNCHER_SECONDS = 15.0

# What errors of collectives say if another process has ended.
_LOST = ("onnection closed by peer", "onnection reset by peer", "Broken pipe", "remote process exited")


def is_first() -> bool:
    """Whether this process is the first of its job, or the only one, also before they have found each other."""
    return os.environ.get("RANK", "0") == "0"


def join(*, use_cpu: bool = False) -> None:
    """Have the processes of a job find each other, and each its own device, if that has not happened yet.

    Making a Trainer's arguments does the same.

    Args:
        use_cpu: whether they compute on the CPU although there may be a GPU.
    """
    if os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1"):
        from accelerate import PartialState

        PartialState(cpu=use_cpu)


def leave() -> None:
    """End the communication between the processes of a job, which PyTorch otherwise warns about when they end."""
    import torch.distributed as dist

    from scalora.parallel.processes import have_a_group

    if have_a_group():
        dist.destroy_process_group()


def let_the_first_speak() -> None:
    """Before a process that is not the first prints its error: wait for the launcher to end it.

    A mistake that all processes meet is then printed once, by the first. One that only this process meets is printed
    by this process, because nothing ends it while it waits.
    """
    if not is_first():
        time.sleep(_LAUNCHER_SECONDS)


def is_loss_of_another(error: BaseException) -> bool:
    """Whether an error says that another process of the job has ended.

    Args:
        error: what this process met.
    """
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1") and any(text in str(error) for text in _LOST)


def let_the_lost_be_named(error: BaseException) -> None:
    """Before a process ends because another has: wait for the launcher to see that one first, and to name it.

    Args:
        error: what this process met.
    """
    if is_loss_of_another(error):
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


def first_of_any(value: Any) -> Any:
    """What any process has found: of several that have found something, the value of the lowest number.

    Args:
        value: what this process has found; None if it has found nothing.
    """
    return next((found for found in from_all(value) if found is not None), None)


def from_all(value: Any) -> list[Any]:
    """The values of all processes, in the order of their numbers.

    Args:
        value: the value of this process; any object that can be pickled.
    """
    import torch.distributed as dist

    from scalora.parallel.processes import have_a_group

    if not have_a_group():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
