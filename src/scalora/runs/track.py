"""`track`: a progress bar on standard error, so that standard output holds results alone."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich import progress
from rich.console import Console

from scalora.parallel.job import from_all, is_first
from scalora.parallel.processes import process_count, process_rank

_T = TypeVar("_T")
_R = TypeVar("_R")


def track(items: Iterable[_T], description: str, total: float | None = None) -> Iterable[_T]:
    """`rich.progress.track` on standard error. In a job of several processes, the first shows it.

    Args:
        items: what is gone through.
        description: what is shown beside the bar.
        total: how many there are. None: their length.
    """
    return progress.track(items, description, total, console=Console(stderr=True), disable=not is_first())


def share(items: Sequence[_T]) -> list[_T]:
    """The items that this process of a job works on; all of them if it is the only one.

    Args:
        items: all items, the same in all processes.
    """
    return list(items[process_rank() :: process_count()])


def of_all(found: Sequence[_R]) -> list[_R]:
    """What all processes have found, in all of them.

    Args:
        found: what this process has found.
    """
    return [item for part in from_all(list(found)) for item in part]
