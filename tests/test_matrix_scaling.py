"""Matrix scaling against dense least squares over symmetric matrices, and the laws it obeys."""

from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import scalora
from scalora.maths.matrix import matrix_scaling_of_grams
from scalora.maths.mode import LEFT_ALONE, MATRIX
from scalora.maths.roots import by_newton, inverse_root
from scalora.maths.scaling import grams, scaling_of_grams

VECTORS = load_file(Path(__file__).parent / "data" / "scaling.safetensors")
CASES = sorted({key.split(".")[0] for key in VECTORS})

GRADIENTS = ("full", "below r", "of r", "of one", "in the span")


def case(name):
    return tuple(VECTORS[f"{name}.{key}"] for key in ("A", "B", "G"))


@st.composite
def layers(draw, largest_exponent=2.0):
    """A, B and G: any shapes with m, n ≥ r, singular values down to 10^-2, gradients of any rank."""
    r = draw(st.integers(1, 6))
    m, n = r + draw(st.integers(0, 12)), r + draw(st.integers(0, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    exponent = draw(st.floats(0, largest_exponent))
    make = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    A, B = (with_singular_values(make(d, r), torch.logspace(0, -exponent, r)) for d in (m, n))
    gradients = {
        "full": lambda: make(m, n),
        "below r": lambda: make(m, max(1, r - 1)) @ make(max(1, r - 1), n),
        "of r": lambda: make(m, r) @ make(r, n) + 1e-6 * make(m, n),
        "of one": lambda: make(m, 1) @ make(1, n),
        "in the span": lambda: A @ make(r, r) @ B.mT + 1e-6 * make(m, n),
    }
    return A, B, gradients[draw(st.sampled_from(GRADIENTS))]()


def with_singular_values(matrix, values):
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U * values.to(U) @ Vh


def inputs(A, B, G):
    return A, B, G @ B, G.mT @ A


def residual(A, B, G, X, Y):
    """Densely, and without the function under test."""
    return ((G - A @ X @ A.mT @ G - G @ B @ Y @ B.mT).norm() / G.norm()) ** 2


def smallest_residual(A, B, G):
    """Over all symmetric X and Y, from m·n equations in r(r + 1) unknowns."""
    U_A, U_B = torch.linalg.qr(A)[0], torch.linalg.qr(B)[0]
    terms = []
    for i, j in product(range(A.shape[1]), repeat=2):
        if i <= j:
            E = torch.zeros(A.shape[1], A.shape[1], dtype=A.dtype)
            E[i, j] = E[j, i] = 1
            terms += [(U_A @ E @ U_A.mT @ G).flatten(), (G @ U_B @ E @ U_B.mT).flatten()]
    equations = torch.stack(terms, dim=1)
    solution = torch.linalg.lstsq(equations, G.flatten()[:, None], driver="gelsd").solution[:, 0]
    return ((G.flatten() - equations @ solution).norm() / G.norm()) ** 2


def scaled(A, B, G, **options):
    return matrix_scaling_of_grams(grams(*inputs(A, B, G)), **options)


def check_is_the_optimum(A, B, G):
    X, Y = scalora.matrix_scaling(*inputs(A, B, G))
    best = scalora.matrix_residual(G, A, B, X, Y)
    torch.testing.assert_close(best, smallest_residual(A, B, G), rtol=0, atol=1e-8)
    torch.testing.assert_close(best, residual(A, B, G, X, Y), rtol=0, atol=1e-8)
    assert best >= scalora.oracle_residual(G, A.shape[1]) - 1e-8
    for worse in (scalora.column_scaling, scalora.scalar_scaling):
        assert best <= scalora.relative_residual(G, A, B, worse(*inputs(A, B, G))) + 1e-8
    assert best <= scalora.matrix_residual(G, A, B, *scalora.polar_scaling(A, B)) + 1e-8


@pytest.mark.parametrize("name", CASES)
def test_the_optimum_on_the_vectors(name):
    check_is_the_optimum(*case(name))


@pytest.mark.slow
@settings(deadline=None, max_examples=80)
@given(layers())
def test_the_optimum_is_dense_least_squares_over_symmetric_matrices(layer):
    check_is_the_optimum(*layer)


@settings(deadline=None, max_examples=80)
@given(layers(), st.floats(0.1, 10))
def test_the_matrices_that_are_chosen_attain_the_optimum(layer, target_norm):
    A, B, G = layer
    chosen = scaled(A, B, G, target_norm=target_norm, optimum="exact")
    assert chosen.choice == MATRIX
    X, Y = chosen.P @ chosen.P.mT / target_norm**2, chosen.Q @ chosen.Q.mT / target_norm**2
    # Eigenvalues below 1e-3 are raised to it, which costs at most its square.
    torch.testing.assert_close(residual(A, B, G, X, Y), smallest_residual(A, B, G), rtol=0, atol=2e-6)


@settings(deadline=None, max_examples=60)
@given(layers())
def test_the_optimum_never_lengthens_an_orthonormal_direction(layer):
    A, B, G = layer
    for factor, X in zip((A, B), scalora.matrix_scaling(*inputs(A, B, G)), strict=True):
        root = torch.linalg.qr(factor)[1]
        eigenvalues = torch.linalg.eigvalsh(root @ X @ root.mT)
        assert eigenvalues[0] > -1e-6
        assert eigenvalues[-1] < 1 + 1e-6


def test_the_optimum_is_orthonormal_factors_where_the_gradient_is_outside_of_both_spans():
    A, B, G = case("09_gauss_33x64r8")
    U_A, U_B = torch.linalg.qr(A)[0], torch.linalg.qr(B)[0]
    G = G - U_A @ U_A.mT @ G @ U_B @ U_B.mT
    for found, polar in zip(scalora.matrix_scaling(*inputs(A, B, G)), scalora.polar_scaling(A, B), strict=True):
        torch.testing.assert_close(found, polar)


@settings(deadline=None, max_examples=40)
@given(layers(largest_exponent=1.0), st.floats(1e-20, 1e20))
def test_the_scale_of_the_gradient_does_not_matter(layer, factor):
    A, B, G = layer
    once, again = (scalora.matrix_scaling(*inputs(A, B, scale * G)) for scale in (1, factor))
    torch.testing.assert_close(
        scalora.matrix_residual(G, A, B, *once), scalora.matrix_residual(G, A, B, *again), rtol=0, atol=1e-9
    )
    for one, other in zip(once, again, strict=True):
        # Where G hardly tells one solution from another, rounding does.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-2 * max(1, one.abs().max().item()))


@settings(deadline=None, max_examples=60)
@given(layers(), st.floats(0.1, 10), st.floats(0.1, 10))
def test_polar_factors_are_orthonormal_times_the_target_norm(layer, of_A, of_B):
    A, B, G = layer
    chosen = scaled(A, B, G, target_norm=torch.tensor([of_A, of_B], dtype=torch.float64))
    assert chosen.choice == MATRIX
    identity = torch.eye(A.shape[1], dtype=A.dtype)
    for factor, matrix, norm in ((A, chosen.P, of_A), (B, chosen.Q, of_B)):
        changed = factor @ matrix / norm
        torch.testing.assert_close(changed.mT @ changed, identity, rtol=0, atol=1e-7)
        torch.testing.assert_close(matrix, matrix.mT)
    for factor, X in zip((A, B), scalora.polar_scaling(A, B), strict=True):
        torch.testing.assert_close(factor @ X @ factor.mT @ factor, factor, rtol=0, atol=1e-7)


@settings(deadline=None, max_examples=40)
@given(layers(), st.sampled_from(["polar", "exact"]))
def test_what_a_rescale_merges_and_what_it_leaves_are_the_same_function(layer, optimum):
    A, B, G = layer
    chosen = scaled(A, B, G, target_norm=0.7, optimum=optimum)
    P, Q = chosen.P, chosen.Q
    kept = A @ (torch.eye(A.shape[1], dtype=A.dtype) - P @ Q.mT) @ B.mT
    torch.testing.assert_close(kept + (A @ P) @ (B @ Q).mT, A @ B.mT, rtol=0, atol=1e-8)
    assert torch.linalg.matrix_rank(P) == torch.linalg.matrix_rank(Q) == A.shape[1]


@pytest.mark.parametrize("optimum", ["polar", "exact"])
def test_layers_are_scaled_together_as_they_are_alone(optimum):
    generator = torch.Generator().manual_seed(0)
    A, B, G = (
        torch.randn(2, 3, *size, generator=generator, dtype=torch.float64) for size in ((14, 4), (11, 4), (14, 11))
    )
    G[0, 1] = A[0, 1] @ torch.randn(4, 4, generator=generator, dtype=torch.float64) @ B[0, 1].mT
    together = scaled(A, B, G, target_norm=2.0, optimum=optimum)
    matrices = scalora.matrix_scaling(*inputs(A, B, G))
    for i, j in product(range(2), range(3)):
        alone = scaled(A[i, j], B[i, j], G[i, j], target_norm=2.0, optimum=optimum)
        for found, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(found[i, j], expected, rtol=1e-6, atol=1e-8)
        for found, expected in zip(matrices, scalora.matrix_scaling(*inputs(A[i, j], B[i, j], G[i, j])), strict=True):
            torch.testing.assert_close(found[i, j], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_solved_in_float64_whatever_the_dtype(dtype):
    A, B, G = (t.to(dtype) for t in case("11_illcond_33x64r8"))
    GB, GtA = G @ B, G.mT @ A
    exact = [t.double() for t in (A, B, GB, GtA)]
    for found, expected in zip(scalora.matrix_scaling(A, B, GB, GtA), scalora.matrix_scaling(*exact), strict=True):
        torch.testing.assert_close(found, expected)
    for found, expected in zip(scalora.polar_scaling(A, B), scalora.polar_scaling(*exact[:2]), strict=True):
        torch.testing.assert_close(found, expected)


# Which of A, B and G, where, what; whether that is for want of finite entries.
LEFT = {
    "zero A": (0, ..., 0.0, False),
    "zero B": (1, ..., 0.0, False),
    "NaN in G": (2, (1, 1), float("nan"), True),
    "inf in G": (2, (0, 2), float("inf"), True),
    "NaN in A": (0, (0, 0), float("nan"), True),
    "inf in B": (1, (0, 0), float("inf"), True),
    "squares of A beyond float64": (0, (0, 0), 1e200, True),
}


@pytest.mark.parametrize("optimum", ["polar", "exact"])
@pytest.mark.parametrize("name", LEFT)
def test_degenerate_layers_are_left_alone_and_counted(name, optimum):
    A, B, G = case("03_gauss_12x9r2")
    which, index, value, nonfinite = LEFT[name]
    broken = [A.clone(), B.clone(), G.clone()]
    broken[which][index] = value
    stacked = [torch.stack([healthy, sick]) for healthy, sick in zip((A, B, G), broken, strict=True)]
    chosen = scaled(*stacked, target_norm=3.0, optimum=optimum)
    assert chosen.choice.tolist() == [MATRIX, LEFT_ALONE]
    assert chosen.degenerate.tolist() == [False, True]
    assert chosen.nonfinite.tolist() == [False, nonfinite]
    assert chosen.exploding.tolist() == [False, False]
    alone = scaled(A, B, G, target_norm=3.0, optimum=optimum)
    for matrix, healthy in ((chosen.P, alone.P), (chosen.Q, alone.Q)):
        torch.testing.assert_close(matrix[0], healthy)
        assert torch.equal(matrix[1], torch.eye(2, dtype=torch.float64))
    for found, healthy in zip(
        scalora.matrix_scaling(*inputs(*stacked)), scalora.matrix_scaling(*inputs(A, B, G)), strict=True
    ):
        torch.testing.assert_close(found[0], healthy)
        assert (found[1] == 0).all()
    assert all(X.isfinite().all() for X in scalora.polar_scaling(*stacked[:2]))


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_factors_far_from_the_target_norm_are_left_alone_and_counted(size):
    A, B, G = case("03_gauss_12x9r2")
    chosen = scaled(size * A, B, G, target_norm=1.0)
    assert chosen.choice == LEFT_ALONE
    assert chosen.exploding
    assert not chosen.degenerate
    assert torch.equal(chosen.P, torch.eye(2, dtype=torch.float64))
    assert scaled(size * A, size * B, G, target_norm=size).choice == MATRIX


@pytest.mark.parametrize("optimum", ["polar", "exact"])
def test_a_zero_gradient_needs_nothing_but_orthonormal_factors(optimum):
    A, B, G = case("03_gauss_12x9r2")
    chosen = scaled(A, B, 0 * G, target_norm=1.0, optimum=optimum)
    torch.testing.assert_close((A @ chosen.P).mT @ (A @ chosen.P), torch.eye(2, dtype=torch.float64))
    assert chosen.choice == MATRIX


@pytest.mark.parametrize("root", ["eigenvalues", "newton"])
@pytest.mark.parametrize("optimum", ["polar", "exact"])
@pytest.mark.parametrize("lacking", ["columns that depend on each other", "fewer rows than columns", "rows of zeros"])
def test_directions_that_a_factor_lacks_are_scaled_as_the_others_which_become_orthonormal(
    lacking, optimum, root, monkeypatch
):
    if root == "newton":  # as on a GPU
        monkeypatch.setattr("scalora.maths.roots._by_eigenvalues", by_newton)
    generator = torch.Generator().manual_seed(3)
    m = 2 if lacking == "fewer rows than columns" else 20
    A = torch.randn(m, 2, generator=generator) @ torch.randn(2, 4, generator=generator)
    if lacking == "rows of zeros":
        A = torch.cat([torch.randn(2, 4, generator=generator), torch.zeros(18, 4)])
    B, G = torch.randn(9, 4, generator=generator), torch.randn(m, 9, generator=generator)
    chosen = scaled(A, B, G, target_norm=1.0, optimum=optimum)
    assert chosen.choice == MATRIX
    _, extents, directions = torch.linalg.svd(A.double())
    lacked = directions[2:].mT
    image = chosen.P @ lacked
    typical = (extents[:2].square().mean()).rsqrt()
    if optimum == "polar":
        torch.testing.assert_close(torch.linalg.svdvals(A.double() @ chosen.P)[:2], torch.ones(2).double())
        torch.testing.assert_close(image, typical * lacked, rtol=1e-5, atol=1e-5 * float(typical))
    assert torch.linalg.matrix_norm(image, 2) < 1.001 * typical


def test_a_skipped_step_leaves_all_layers_alone():
    A, B, G = case("03_gauss_12x9r2")
    chosen = scaled(*(torch.stack([t, 0 * t, t * float("nan")]) for t in (A, B, G)), target_norm=1.0)
    kept = chosen.unless(torch.tensor(False))
    assert all(torch.equal(one, other) for one, other in zip(kept, chosen, strict=True))
    skipped = chosen.unless(torch.tensor(True))
    identity = torch.eye(2, dtype=torch.float64).expand(3, 2, 2)
    assert torch.equal(skipped.P, identity)
    assert torch.equal(skipped.Q, identity)
    assert skipped.choice.tolist() == [LEFT_ALONE] * 3
    assert not any(getattr(skipped, reason).any() for reason in ("degenerate", "nonfinite", "exploding"))


def test_column_scalings_refuse_the_mode_of_matrices():
    A, B, G = case("03_gauss_12x9r2")
    for refuse in (
        lambda: scalora.choose_scaling(*inputs(A, B, G), target_norm=1.0, mode="matrix"),
        lambda: scaling_of_grams(grams(*inputs(A, B, G)), target_norm=1.0, mode="matrix"),
    ):
        with pytest.raises(ValueError, match="mode='matrix'") as raised:
            refuse()
        assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("without_shape_checks")
def test_shapes_that_do_not_belong_together_are_named():
    A, B, G = case("03_gauss_12x9r2")
    with pytest.raises(ValueError, match="GB"):
        scalora.matrix_scaling(A, B, G.mT @ A, G @ B)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 16), st.floats(0, 12), st.sampled_from(["even", "one", "few"]), st.integers(0, 2**31 - 1))
@example(16, 6.0, "even", 0)
@example(16, 12.0, "few", 0)
def test_newtons_root_is_that_of_the_eigenvalues(r, exponent, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(3, r, r, generator=generator, dtype=torch.float64))
    smallest = 10**-exponent
    values = torch.full((r,), smallest if kind == "few" else 1.0, dtype=torch.float64)
    values[0], values[-1] = 1, smallest
    if kind == "even":
        values = torch.logspace(0, -exponent, r, dtype=torch.float64)
    matrix = basis * values @ basis.mT
    expected = basis * values.rsqrt() @ basis.mT
    found = by_newton((matrix + matrix.mT) / 2)
    # The rounding of the matrix itself changes its smallest eigenvalue by 1e-16 of the largest.
    error = (found - expected).norm(dim=(-2, -1)) / expected.norm(dim=(-2, -1))
    assert (error < 1e-12 + 1e-15 * r / smallest).all()
    assert torch.equal(found, found.mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_roots_of_singular_and_unusable_matrices(dtype):
    rows = torch.randn(8192, 1, generator=torch.Generator().manual_seed(0), dtype=dtype) * torch.ones(8, dtype=dtype)
    gram = rows.mT @ rows
    indefinite = torch.diag(torch.tensor([4, 1, 1, 1, 1, 1, 1, -1], dtype=dtype))
    stack = torch.stack([gram, 0 * gram, gram * float("nan"), -gram, indefinite, 1e20 * gram])
    root, usable = inverse_root(stack, relative_damping=0.0)
    assert usable.tolist() == [True, False, False, False, False, True]
    assert root.isfinite().all()
    assert (root[1:5] == 0).all()
    assert (
        by_newton(gram / gram.trace() * 8 + 32 * 8 * torch.finfo(dtype).eps * torch.eye(8, dtype=dtype))
        .isfinite()
        .all()
    )


def test_the_damping_of_a_root():
    values = torch.tensor([4.0, 1.0, 1e-4], dtype=torch.float64)
    root, _ = inverse_root(torch.diag(values), relative_damping=1e-3, absolute_damping=0.5)
    torch.testing.assert_close(root, torch.diag((values + 1e-3 * values.mean() + 0.5).rsqrt()))
