"""Leading eigenspaces without eigenvalues: as good as the best, for any spectrum."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalora.maths.subspace import by_purification, leading_subspace

SIZE = 24

# Runs of singular values, as decimal exponents below the one before and shapes: equal, falling, or zero.
RUNS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 1e-4, 0.01, 0.3, 1.0, 3.0]),
        st.integers(1, SIZE),
        st.sampled_from(["equal", "falling", "nearly equal", "zero"]),
    ),
    min_size=1,
    max_size=5,
)


def spectrum(runs):
    values, exponent = [], 0.0
    for drop, length, kind in runs:
        exponent -= drop
        step = {"equal": 0.0, "falling": 0.1, "nearly equal": 1e-4, "zero": torch.inf}[kind]
        values += [10 ** (exponent - step * (i + (kind == "zero"))) for i in range(length)]
    values = torch.tensor((values + [0.0] * SIZE)[:SIZE], dtype=torch.float64)
    return values.nan_to_num(0).sort(descending=True).values


@settings(max_examples=150, deadline=None)
@given(runs=RUNS, rank=st.integers(1, SIZE), seed=st.integers(0, 99), aligned=st.booleans())
def test_no_subspace_leaves_out_less(runs, rank, seed, aligned):
    generator = torch.Generator().manual_seed(seed)
    values = spectrum(runs)
    vectors = torch.eye(SIZE, dtype=torch.float64)[torch.randperm(SIZE, generator=generator)]
    if not aligned:
        vectors = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))[0]
    half = vectors * values
    # Others of another scale beside it, which must not matter.
    stack = torch.stack([half @ half.T, 1e-6 * torch.eye(SIZE, dtype=torch.float64), 1e6 * half @ half.T])
    found = by_purification(stack, rank)
    torch.testing.assert_close(
        found.mT @ found, torch.eye(rank, dtype=torch.float64).expand(3, -1, -1), atol=1e-12, rtol=0
    )
    for basis in (found[0], found[2]):
        left_out = (half - basis @ (basis.T @ half)).norm()
        assert left_out <= 1.001 * values[rank:].norm() + 1e-7 * values[0]


def test_the_eigenvectors_themselves_on_a_cpu():
    values = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    found = leading_subspace(values.diag()[None], 2)
    torch.testing.assert_close(found.abs()[0], torch.eye(3, dtype=torch.float64)[:, [1, 2]])
