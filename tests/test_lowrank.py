import pytest
import torch

from scalora import effective_rank, numerical_rank


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_both_ranks_of_a_projection_are_its_dimension(rank):
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(20, rank))
    assert numerical_rank(basis @ basis.T) == rank
    assert effective_rank(basis @ basis.T) == pytest.approx(rank, rel=1e-4)


def test_the_effective_rank_weighs_what_the_numerical_one_counts():
    matrix = torch.diag(torch.tensor([1.0, 0.5, 0.25, 1e-5]))
    shares = torch.tensor([1.0, 0.5, 0.25, 1e-5]).double() / 1.75001
    assert numerical_rank(matrix) == 3
    assert effective_rank(matrix) == pytest.approx(float((-shares * shares.log()).sum().exp()))


def test_a_zero_matrix_has_rank_zero():
    assert numerical_rank(torch.zeros(4, 6)) == 0
    assert effective_rank(torch.zeros(4, 6)) == 0
