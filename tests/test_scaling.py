"""The closed forms against the independent solver's vectors, dense least squares, and the laws they obey."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import scalora
from scalora.maths.mode import COLUMN, LEFT_ALONE, SCALAR
from scalora.maths.scaling import _gram_in_pieces

VECTORS = load_file(Path(__file__).parent / "data" / "scaling.safetensors")
CASES = sorted({key.split(".")[0] for key in VECTORS})

shapes = st.tuples(st.integers(1, 5), st.integers(0, 12), st.integers(0, 12), st.integers(0, 2**31 - 1))


def case(name):
    return {key.split(".")[1]: value for key, value in VECTORS.items() if key.startswith(name + ".")}


def gaussian(shape):
    r, extra_m, extra_n, seed = shape
    generator = torch.Generator().manual_seed(seed)
    m, n = 2 * r + 2 + extra_m, 2 * r + 2 + extra_n
    make = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    return make(m, r), make(n, r), make(m, n)


def inputs(A, B, G):
    return A, B, G @ B, G.mT @ A


def dense_least_squares(A, B, G):
    """v from the 2r rank-one matrices themselves, flattened: no Gram, no closed form."""
    r = A.shape[1]
    terms = [torch.outer(A[:, i], G.T @ A[:, i]) for i in range(r)]
    terms += [torch.outer(G @ B[:, j], B[:, j]) for j in range(r)]
    X = torch.stack([term.flatten() for term in terms], dim=1)
    return torch.linalg.lstsq(X, G.flatten()[:, None], driver="gelsd").solution[:, 0]


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_independent_solver(name):
    c = case(name)
    column, scalar = (f(*inputs(c["A"], c["B"], c["G"])) for f in (scalora.column_scaling, scalora.scalar_scaling))
    torch.testing.assert_close(column, c["v_column"], rtol=1e-6, atol=1e-9 * c["v_column"].abs().max().item())
    torch.testing.assert_close(scalar, c["v_scalar"], rtol=1e-6, atol=0)
    rank = c["A"].shape[1]
    residuals = [
        scalora.relative_residual(c["G"], c["A"], c["B"], column),
        scalora.relative_residual(c["G"], c["A"], c["B"], scalar),
        scalora.oracle_residual(c["G"], rank),
    ]
    for residual, key in zip(residuals, ("residual_column", "residual_scalar", "residual_svd"), strict=True):
        torch.testing.assert_close(residual, c[key][0], rtol=0, atol=1e-8)
    assert residuals[2] <= residuals[0] <= residuals[1] + 1e-12
    assert residuals[1] <= 1


@settings(deadline=None, max_examples=60)
@given(shapes)
def test_column_scaling_is_dense_least_squares(shape):
    A, B, G = gaussian(shape)
    torch.testing.assert_close(
        scalora.column_scaling(*inputs(A, B, G)), dense_least_squares(A, B, G), rtol=1e-6, atol=1e-8
    )


@settings(deadline=None, max_examples=60)
@given(shapes, st.floats(1e-20, 1e20))
def test_v_does_not_change_when_the_gradient_is_scaled(shape, factor):
    A, B, G = gaussian(shape)
    for scaling in (scalora.column_scaling, scalora.scalar_scaling):
        torch.testing.assert_close(scaling(*inputs(A, B, G * factor)), scaling(*inputs(A, B, G)), rtol=1e-7, atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(shapes)
def test_permuting_columns_permutes_v(shape):
    A, B, G = gaussian(shape)
    r = A.shape[1]
    order = torch.randperm(r, generator=torch.Generator().manual_seed(shape[3]))
    permuted = scalora.column_scaling(*inputs(A[:, order], B[:, order], G))
    original = scalora.column_scaling(*inputs(A, B, G))
    torch.testing.assert_close(permuted, original[torch.cat([order, order + r])], rtol=1e-7, atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(shapes, st.floats(0.1, 10.0))
def test_factors_are_positive_and_layers_left_alone_have_ones(shape, target_norm):
    A, B, G = gaussian(shape)
    chosen = scalora.choose_scaling(*inputs(A, B, G), target_norm=target_norm)
    assert (chosen.alpha > 0).all()
    assert (chosen.beta > 0).all()
    v = scalora.column_scaling(*inputs(A, B, G))
    if chosen.choice == COLUMN:
        torch.testing.assert_close(torch.cat([chosen.alpha, chosen.beta]), v.sqrt() * target_norm)
    elif chosen.choice == SCALAR:
        assert (v <= 1e-9).any()
        assert chosen.alpha.unique().numel() == chosen.beta.unique().numel() == 1
    else:
        assert (chosen.alpha == 1).all()
        assert (chosen.beta == 1).all()


@settings(deadline=None, max_examples=40)
@given(shapes)
def test_no_perturbation_does_better_than_the_optimum(shape):
    A, B, G = gaussian(shape)
    for scaling in (scalora.column_scaling, scalora.scalar_scaling):
        v = scaling(*inputs(A, B, G))
        best = scalora.relative_residual(G, A, B, v)
        generator = torch.Generator().manual_seed(shape[3])
        for size in (1e-3, 1e-1, 1.0):
            perturbed = v + size * v.abs().max() * torch.randn(v.shape, generator=generator, dtype=v.dtype)
            assert scalora.relative_residual(G, A, B, perturbed) >= best - 1e-12


@settings(deadline=None, max_examples=40)
@given(shapes)
def test_captured_energy_is_what_the_residual_lacks(shape):
    A, B, G = gaussian(shape)
    equations = scalora.normal_equations(*inputs(A, B, G))
    for v in (scalora.column_scaling(*inputs(A, B, G)), scalora.scalar_scaling(*inputs(A, B, G))):
        captured = scalora.captured_energy(equations, v) / G.square().sum()
        torch.testing.assert_close(captured, 1 - scalora.relative_residual(G, A, B, v), rtol=1e-6, atol=1e-9)


def test_layers_are_solved_together_as_they_are_alone():
    generator = torch.Generator().manual_seed(0)
    A, B, G = (
        torch.randn(2, 3, *size, generator=generator, dtype=torch.float64) for size in ((14, 4), (11, 4), (14, 11))
    )
    together = scalora.column_scaling(*inputs(A, B, G))
    alone = [scalora.column_scaling(*inputs(A[i, j], B[i, j], G[i, j])) for i in range(2) for j in range(3)]
    torch.testing.assert_close(together, torch.stack(alone).unflatten(0, (2, 3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_float_dtype_is_solved_in_float64(dtype):
    A, B, G = (x.to(dtype) for x in gaussian((3, 4, 5, 1)))
    GB, GtA = G @ B, G.mT @ A
    exact = scalora.column_scaling(A.double(), B.double(), GB.double(), GtA.double())
    result = scalora.column_scaling(A, B, GB, GtA)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, exact)


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_ill_conditioned_adapters_are_survived(scale):
    A, B, G = gaussian((4, 6, 3, 7))
    A = A * torch.logspace(0, torch.tensor(scale).log10().item(), 4, dtype=torch.float64)
    v = scalora.column_scaling(*inputs(A, B, G))
    dense = dense_least_squares(A / A.norm(dim=0), B, G)
    torch.testing.assert_close(v[:4] * A.norm(dim=0) ** 2, dense[:4], rtol=1e-6, atol=1e-9)


DEGENERATE = {
    "zero A": (0, None, 0.0),
    "zero B": (1, None, 0.0),
    "zero G": (2, None, 0.0),
    "NaN in G": (2, (1, 1), float("nan")),
    "inf in G": (2, (0, 2), float("inf")),
    "NaN in A": (0, (0, 0), float("nan")),
    "a zero column of A": (0, (slice(None), 1), 0.0),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_layers_are_left_alone_and_reported(name):
    A, B, G = gaussian((2, 4, 3, 3))
    which, index, value = DEGENERATE[name]
    broken = [A.clone(), B.clone(), G.clone()]
    broken[which][index if index is not None else ...] = value
    stacked = [torch.stack([healthy, sick]) for healthy, sick in zip((A, B, G), broken, strict=True)]
    chosen = scalora.choose_scaling(*inputs(*stacked), target_norm=1.0)
    assert chosen.degenerate.tolist() == [False, True]
    assert chosen.choice[1] == LEFT_ALONE
    assert (chosen.alpha[1] == 1).all()
    assert (chosen.beta[1] == 1).all()
    for scaling in (scalora.column_scaling, scalora.scalar_scaling):
        together, alone = scaling(*inputs(*stacked)), scaling(*inputs(A, B, G))
        torch.testing.assert_close(together[0], alone)
        assert (together[1] == 0).all()


def test_a_singular_system_falls_back_to_scalar():
    A, B, G = gaussian((1, 6, 6, 5))
    A, B = A.repeat(1, 2), B.repeat(1, 2)
    chosen = scalora.choose_scaling(*inputs(A, B, G), target_norm=1.0)
    assert chosen.choice != COLUMN
    assert chosen.alpha.isfinite().all()


@settings(deadline=None, max_examples=40)
@given(shapes)
def test_the_optimal_adapter_attains_the_oracle_residual(shape):
    _, _, G = gaussian(shape)
    rank = shape[0]
    A, B = scalora.optimal_adapter(G, rank, target_norm=2.0)
    residual = scalora.relative_residual(G, A, B, torch.full((2,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(residual, scalora.oracle_residual(G, rank), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(A.mT @ A, 4 * torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(B.mT @ B, 4 * torch.eye(rank, dtype=torch.float64))


@pytest.mark.parametrize("rank", [0, 4])
def test_the_optimal_adapter_refuses_a_rank_that_does_not_fit(rank):
    with pytest.raises(ValueError, match=f"rank={rank}"):
        scalora.optimal_adapter(torch.randn(7, 9), rank)


@pytest.mark.usefixtures("without_shape_checks")
def test_shapes_that_do_not_belong_together_are_named():
    A, B, G = gaussian((2, 1, 4, 0))
    with pytest.raises(ValueError, match="GB"):
        scalora.column_scaling(A, B, G.mT @ A, G @ B)


@given(layers=st.integers(0, 3), rows=st.integers(0, 600), columns=st.integers(1, 5), seed=st.integers(0, 99))
def test_inner_products_in_pieces_as_on_a_gpu_are_those_of_whole_columns(layers, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, layers, rows, columns, generator=generator)
    both = torch.cat([first, second], -1).double()
    found = _gram_in_pieces(first, second, torch.float64)
    torch.testing.assert_close(found, both.mT @ both, rtol=1e-12, atol=1e-12)
