"""Mixes several sets of examples by weights: rows of what was loaded, and streams, by the same turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Dataset

from scalora.runs.names import SetNames


def turns(weights: Sequence[float], seed: int) -> Iterator[int]:
    """Which of several sets the next example is of, without an end: each as often as its weight says, at random.

    Args:
        weights: the weight of each set.
        seed: seed of the random choices.
    """
    generator = np.random.default_rng(seed)
    bounds = np.cumsum(weights) / np.sum(weights)
    while True:
        yield from np.searchsorted(bounds[:-1], generator.random(1000), side="right").tolist()


def mixed(rows: Dataset, name: str, value: object, seed: int) -> Dataset:
    """The examples of an epoch.

    Args:
        rows: the examples, of several sets one set after the other.
        name: the names of the sets.
        value: value of ``data.train``; a mapping has the weights of the sets.
        seed: seed of the order.

    Returns:
        With weights, the sets in turns until each has had all of its examples at least once, in an order of their own;
        without, all examples, in a random order if there are several sets. KTO's trainer does not shuffle.
    """
    if not isinstance(name, SetNames):
        return rows
    if not isinstance(value, dict):
        return rows.shuffle(seed=seed)
    ends = [*name.starts[1:], len(rows)]
    generator = np.random.default_rng(seed)
    sets = [start + generator.permutation(end - start) for start, end in zip(name.starts, ends, strict=True)]
    taken, chosen, left = [0] * len(sets), [], len(sets)
    for index in turns(list(value.values()), seed):
        places = sets[index]
        chosen.append(int(places[taken[index] % len(places)]))
        taken[index] += 1
        left -= taken[index] == len(places)
        if not left:
            break
    return rows.select(chosen)
