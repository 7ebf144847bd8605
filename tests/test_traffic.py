"""How large the collectives of a rescale are, by the formulas that the counts of test_fsdp and test_zero equal."""

import pytest
from models import with_lora
from torch import nn

from scalora.bench.several_gpus import rescale_collectives
from scalora.model.adapters import find_lora_pairs
from scalora.parallel.buckets import gathered_of
from scalora.parallel.traffic import of_gather

PROCESSES = (2, 3, 4, 7, 8, 16, 64)
RANKS = (1, 2, 3, 4, 8, 9, 16, 17)
SHAPES = [(40, 40), (64, 16), (16, 64)]


def layers():
    """A layer of each shape and rank, with the product of its rank and larger side."""
    for m, n in SHAPES:
        for r in RANKS:
            (pair,) = find_lora_pairs(with_lora(nn.Sequential(nn.Linear(n, m)), r=r, target_modules=["0"]))
            yield pair, r * max(m, n)


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize(
    ("parallel", "merge", "bound"),
    [("fsdp2", "dense", 4), ("fsdp2", "factored", 6), *((f"zero{stage}", "dense", 4) for stage in (1, 2, 3))],
)
def test_no_collective_of_a_rescale_by_columns_has_more_entries(parallel, merge, bound, processes):
    for pair, size in layers():
        gathers = rescale_collectives([pair], merge, parallel, processes)[:1]
        (entries,) = [collective.bytes / 4 for collective in gathers]
        assert entries <= bound * size


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize(("whole_B", "bound"), [(False, 6), (True, 8)])
def test_no_collective_of_a_rescale_by_matrices_has_more_entries(whole_B, bound, processes):
    for pair, size in layers():
        _, entries = of_gather(processes, gathered_of(pair, whole_B=whole_B, moments=1))
        assert entries <= bound * size


def test_the_smaller_bound_would_be_broken_where_more_is_gathered():
    pair, size = next((pair, size) for pair, size in layers() if pair.r == 9)
    factored, _ = rescale_collectives([pair], "factored", "fsdp2", 16)
    assert factored.bytes / 4 > 4 * size
    assert of_gather(16, gathered_of(pair, whole_B=False, moments=1))[1] > 4 * size
