"""What a rescale gathers, by the formulas: no more of a layer than four times its larger factor."""

import pytest
from models import Mixed, tiny_llama, with_lora

from scalora.bench.several_gpus import rescale_collectives
from scalora.model.adapters import find_lora_pairs
from scalora.parallel.buckets import gathered_of
from scalora.parallel.traffic import most_of_layer, of_gather, rescale_of_shards

PROCESSES, RANKS = (2, 3, 4, 8, 16, 64), (1, 2, 3, 5, 8, 9)


def layers_of(r):
    """A decoder's layers, and square ones, embeddings and Conv1D, which need all of lora_B."""
    mixed = with_lora(Mixed(vocabulary=32, width=32), r=r, target_modules=["embed", "conv1d", "linear"])
    return find_lora_pairs(mixed) + find_lora_pairs(with_lora(tiny_llama(), r=r, target_modules="all-linear"))


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("merge", ["dense", "factored"])
def test_no_collective_is_larger_than_four_times_the_larger_factor_of_each_layer(merge, r):
    pairs = layers_of(r)
    most = sum(4 * r * max(pair.m, pair.n) for pair in pairs)
    for processes in PROCESSES:
        gathered, products = rescale_collectives(pairs, merge, "fsdp2", processes)
        assert max(gathered.bytes // 4, products.bytes // 8) <= most


@pytest.mark.parametrize("whole_B", [False, True])
def test_nor_is_one_of_a_rescale_by_matrices_of_any_single_layer(whole_B):
    kinds = set()
    for r in RANKS:
        for pair in layers_of(r):
            matrices = gathered_of(pair, whole_B=whole_B, moments=1)
            for processes in PROCESSES:
                gathered, _ = rescale_of_shards(processes, [[(r, matrices)]])
                assert gathered.bytes <= 4 * 4 * r * max(pair.m, pair.n)
                # With the least traffic it would be more, somewhere.
                kinds.add(of_gather(processes, matrices)[1] > most_of_layer(matrices))
    assert kinds == {False, True}


def test_a_sum_takes_the_place_of_a_gather_that_would_pad_to_more():
    matrices = [(9, 32), (9, 32), (32, 9)]
    gathered, _ = rescale_of_shards(16, [[(9, matrices)]])
    assert gathered == ("sum", 4 * 3 * 9 * 32)
    assert of_gather(16, matrices) == (False, 2 * 16 * 32 + 32 * 9)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("r", RANKS)
def test_neither_is_one_of_zero_s_by_columns(stage, r):
    for pair in layers_of(r):
        for processes in PROCESSES:
            (gathered,) = rescale_collectives([pair], "dense", f"zero{stage}", processes)
            assert gathered.bytes <= 4 * 4 * r * max(pair.m, pair.n)
