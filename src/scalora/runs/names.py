"""What errors call data: one or several sets of examples, their rows and columns."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate


class SetNames(str):
    """The names of several sets, whose examples come one after the other.

    Args:
        names: file or hub id of each set.
        counts: how many examples each has.

    Attributes:
        names: file or hub id of each set.
        starts: the place of each set's first example.
    """

    names: tuple[str, ...]
    starts: tuple[int, ...]

    def __new__(cls, names: Sequence[str], counts: Sequence[int]) -> SetNames:
        """A text with all names, and where each set begins."""
        made = super().__new__(cls, ", ".join(names))
        made.names = tuple(names)
        made.starts = (0, *accumulate(counts[:-1]))
        return made


def row_name(name: str, place: int) -> str:
    """What an error calls an example.

    Args:
        name: file or hub id of the data, or the names of several.
        place: number of the example, from 0.
    """
    of_set = name
    if isinstance(name, SetNames):
        index = bisect_right(name.starts, place) - 1
        of_set, place = name.names[index], place - name.starts[index]
    return f"data {of_set!r}, row {place + 1:,}"


def listed(columns: Sequence[str]) -> str:
    """Names of columns, in quotes where they would not be seen for what they are.

    Args:
        columns: the names.
    """
    return ", ".join(column if column == column.strip() and column else repr(column) for column in columns)
