"""Reads training data while training: rows of files or of the hub, checked, mixed and shuffled as they come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from datasets import IterableDataset, load_dataset

from scalora.runs.data import Examples, hub_name, local_path, require_file, set_names, unreadable
from scalora.runs.data_files import dataset_of, stream_examples
from scalora.runs.errors import InputError
from scalora.runs.formats import Format, format_of
from scalora.runs.mixing import turns
from scalora.runs.names import SetNames, row_name
from scalora.runs.sections import DataSettings
from scalora.runs.tasks import Task
from scalora.runs.templates import Maker, maker

HEAD = 1000
"""Examples of each set that are read before training, to find out what would end it."""


@dataclass(frozen=True)
class Stream:
    """Training data that are read while training, again from the beginning where a set ends.

    Args:
        data: the section ``data`` of the config.
        task: the task, one that TRL trains.
        seed: seed of the order.

    Attributes:
        data: the section ``data`` of the config.
        task: the task.
        seed: seed of the order.
    """

    data: DataSettings
    task: Task
    seed: int

    def head(self) -> Examples:
        """The first examples of each set.

        Raises:
            InputError: a set can't be read, or has no example.
        """
        assert self.data.train is not None
        names = set_names(self.data.train)
        make = maker(self.data)
        heads = [list(islice(_rows(name, make), HEAD)) for name in names]
        for name, rows in zip(names, heads, strict=True):
            if not rows:
                raise InputError(f"data {name!r} has no data: no example is in it")
        rows = dataset_of([row for head in heads for row in head])
        return Examples(rows, names[0] if len(names) == 1 else SetNames(names, [len(head) for head in heads]))

    def examples(self, head: Examples) -> IterableDataset:
        """The examples in the order in which they are trained on, without an end.

        Args:
            head: from `head`, which tells the format.
        """
        form = format_of(head.rows, head.name, self.data, self.task)
        endless = IterableDataset.from_generator(partial(self._endless, form))
        if self.data.shuffle_buffer == 1:
            return endless
        return endless.shuffle(seed=self.seed, buffer_size=self.data.shuffle_buffer)

    def _endless(self, form: Format) -> Iterator[dict[str, Any]]:
        assert self.data.train is not None
        names = set_names(self.data.train)
        weights = list(self.data.train.values()) if isinstance(self.data.train, Mapping) else [1.0]
        make = maker(self.data)
        sets = [_again(name, form, make) for name in names]
        for index in turns(weights, self.seed):
            yield next(sets[index])


def _again(name: str, form: Format, make: Maker | None) -> Iterator[dict[str, Any]]:
    """The checked rows of a set, over and over."""
    while True:
        place = 0
        for place, row in enumerate(_rows(name, make), start=1):
            yield form.checked(row, row_name(name, place - 1))
        if not place:
            raise InputError(f"data {name!r} has no data any more: it has changed while it was read")


def _rows(name: str, make: Maker | None) -> Iterator[dict[str, Any]]:
    for place, row in enumerate(_as_they_are(name)):
        yield row if make is None else make(row, row_name(name, place))


def _as_they_are(name: str) -> Iterator[dict[str, Any]]:
    path = local_path(name)
    if path is not None and not path.is_dir():
        require_file(path, name)
        try:
            yield from stream_examples(path)
        except (OSError, ValueError, NotImplementedError) as error:
            raise unreadable(path, name, error) from None
        return
    of_hub, config, split = hub_name(name)
    try:
        rows = load_dataset(of_hub, config, split=split or "train", streaming=True)
    except Exception as error:  # the libraries below have classes of their own
        raise InputError(f"data {name!r} is not a local file, and streaming it failed: {error}") from None
    yield from rows
