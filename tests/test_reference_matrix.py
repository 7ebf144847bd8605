"""The reference step of matrix scaling with PairAdamW, against the definitions of what it computes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import scalora
from scalora import PairState, reference_matrix_step
from scalora.maths.matrix import matrix_scaling_of_grams
from scalora.maths.reference import reference_matrices
from scalora.maths.scaling import grams

SCALING = 2.0


def random(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)


def layer(m=12, n=9, r=3, seed=0):
    make = random(seed)
    return PairState.start(make(m, n), make(m, r), make(n, r))


def weight(state):
    return state.weight + SCALING * state.A @ state.B.T


def step(state, G, **options):
    return reference_matrix_step(state, G, **{"scaling": SCALING, "learning_rate": 0.0, "target_norm": 0.7} | options)


@pytest.mark.parametrize("optimum", ["polar", "exact"])
def test_a_rescale_keeps_the_function_and_changes_the_factors(optimum):
    before = layer()
    after = step(before, random(1)(12, 9), optimum=optimum)
    torch.testing.assert_close(weight(after), weight(before))
    assert torch.linalg.matrix_rank(after.weight - before.weight, rtol=1e-10) == 3
    if optimum == "polar":
        for factor in (after.A, after.B):
            torch.testing.assert_close(factor.T @ factor, 0.49 * torch.eye(3, dtype=torch.float64))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(0, 9), st.integers(0, 9), st.booleans(), st.integers(0, 2**31 - 1))
def test_its_matrices_are_those_of_the_closed_form(r, extra_m, extra_n, in_the_span, seed):
    make = random(seed)
    m, n = r + extra_m, r + extra_n
    A, B, G = make(m, r), make(n, r), make(m, n)
    if in_the_span:
        G = A @ make(r, r) @ B.T
    for optimum in ("polar", "exact"):
        P, Q = reference_matrices(G, A, B, 0.7, optimum)
        fast = matrix_scaling_of_grams(grams(A, B, G @ B, G.T @ A), target_norm=0.7, optimum=optimum)
        X, Y = (matrix @ matrix.T / 0.49 for matrix in (P, Q))
        residual = scalora.matrix_residual(G, A, B, fast.P @ fast.P.T / 0.49, fast.Q @ fast.Q.T / 0.49)
        torch.testing.assert_close(scalora.matrix_residual(G, A, B, X, Y), residual, rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimum", ["polar", "exact"])
def test_its_matrices_are_those_of_the_closed_form_exactly_where_the_optimum_is_unique(optimum):
    make = random(3)
    A, B, G = make(20, 4), make(17, 4), make(20, 17)
    fast = matrix_scaling_of_grams(grams(A, B, G @ B, G.T @ A), target_norm=2.0, optimum=optimum)
    for found, expected in zip((fast.P, fast.Q), reference_matrices(G, A, B, 2.0, optimum), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_no_direction_is_lost_where_the_optimum_needs_none_of_a_factor():
    make = random(9)
    A, B, G = make(3, 3), make(9, 3), make(3, 9)  # A spans everything: Y = 0 is as good as any other
    _, Q = reference_matrices(G, A, B, 2.0, "exact")
    torch.testing.assert_close(torch.linalg.svdvals(B @ Q)[-1].item(), 2.0 * 1e-3**0.5)


def test_moments_are_those_of_all_gradients_in_the_basis_of_the_last_rescale():
    make, (beta1, beta2) = random(4), (0.8, 0.95)
    gradients = [make(12, 9) for _ in range(4)]
    state = layer()
    for G, rescale, optimum in zip(
        gradients, (False, True, False, True), ("polar", "polar", "polar", "exact"), strict=True
    ):
        state = step(state, G, rescale=rescale, optimum=optimum, betas=(beta1, beta2))
    histories = (
        ([SCALING * G @ state.B for G in gradients], state.first_A, state.second_A, state.rows_A),
        ([SCALING * G.T @ state.A for G in gradients], state.first_B, state.second_B, state.rows_B),
    )
    for history, first, second, rows in histories:
        average = lambda terms, beta: sum((1 - beta) * beta ** (len(terms) - 1 - k) * t for k, t in enumerate(terms))  # noqa: E731
        squares = [g.T @ g / len(g) for g in history]
        seen = [average(squares[: k + 1], beta2) / (1 - beta2 ** (k + 1)) for k in range(4)]
        weights = [torch.einsum("ij,jk,ik->i", g, V.inverse(), g) / 3 for g, V in zip(history, seen, strict=True)]
        torch.testing.assert_close(first, average(history, beta1))
        torch.testing.assert_close(second, average(squares, beta2))
        torch.testing.assert_close(rows, average(weights, beta2))


def test_the_first_step_is_the_polar_factor_of_the_gradient_with_rows_of_one_length():
    before = layer(m=40, n=30, r=4)
    G = random(5)(40, 30)
    after = step(before, G, learning_rate=1e-3, rescale=False)
    assert torch.equal(after.weight, before.weight)
    size = 1e-3 / (SCALING * (before.A.square().sum() / 40 + before.B.square().sum() / 30).sqrt())
    for old, new, gradient in ((before.A, after.A, G @ before.B), (before.B, after.B, G.T @ before.A)):
        direction = (old - new) / size
        torch.testing.assert_close(
            direction.norm(dim=1), torch.full((len(old),), 2.0, dtype=torch.float64), rtol=1e-6, atol=0
        )
        U, _, Vh = torch.linalg.svd(gradient, full_matrices=False)
        rows = (U @ Vh) / (U @ Vh).norm(dim=1, keepdim=True)
        torch.testing.assert_close(direction, 2 * rows, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("rescale", [False, True])
def test_the_learning_rate_is_by_how_much_an_entry_of_the_weight_moves(rescale):
    before = layer(m=60, n=40, r=4)
    after = step(before, random(6)(60, 40), learning_rate=1e-3, rescale=rescale)
    moved = (weight(after) - weight(before)).square().mean().sqrt().item()
    assert moved == pytest.approx(1e-3, rel=0.1)


def test_a_step_goes_down_a_quadratic_loss_and_its_rank_grows_with_rescales_only():
    target = random(7)(12, 9)
    ranks = {}
    for rescale in (False, True):
        start = state = layer(r=1)
        for _ in range(40):
            state = step(state, weight(state) - target, learning_rate=0.02, target_norm=1.0, rescale=rescale)
        assert (weight(state) - target).norm() < (weight(start) - target).norm()
        ranks[rescale] = torch.linalg.matrix_rank(weight(state) - weight(start), rtol=1e-6)
    assert ranks[False] <= 2
    assert ranks[True] > 4


def test_rows_without_a_gradient_stay_and_a_zero_factor_may_take_the_first_step():
    G = random(8)(12, 9)
    G[2] = 0
    before = layer()
    before = before._replace(A=torch.zeros_like(before.A))
    after = step(before, G, learning_rate=1e-2, rescale=False)
    assert (after.A[2] == 0).all()
    assert (after.A[3] != 0).all()
    torch.testing.assert_close(after.B, before.B)
    assert all(t.isfinite().all() for t in after[:-1])
    assert after.step == 1
