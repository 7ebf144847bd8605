"""An update against its own decompositions, residuals against dense formulas and the independent solver."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import scalora
from scalora.maths.residuals import step_residuals
from scalora.maths.spectrum import update_figures

VECTORS = load_file(Path(__file__).parent / "data" / "scaling.safetensors")
CASES = sorted({key.split(".")[0] for key in VECTORS})


def matrix(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(name):
    return [VECTORS[f"{name}.{key}"] for key in ("G", "A", "B")]


def left_of(G, A, B, alpha, beta, smoothness_rate=1.0):
    """The share of G that a step on A·diag(α), B·diag(β) leaves, as section 3 writes it."""
    A, B = A * alpha, B * beta
    step = smoothness_rate * (G @ B @ B.mT + A @ A.mT @ G)
    return ((G - step).norm() / G.norm()) ** 2


@pytest.mark.parametrize("decay", [0.3, 0.7, 1.0])
def test_the_figures_are_those_of_the_matrix(decay):
    U, V = torch.linalg.qr(matrix(14, 9))[0], torch.linalg.qr(matrix(9, 9, seed=1))[0]
    update = U * 3 * decay ** torch.arange(9) @ V.mT
    values = torch.linalg.svdvals(update)
    figures = update_figures(values)
    assert figures.numerical_rank == scalora.numerical_rank(update)
    assert figures.effective_rank == pytest.approx(scalora.effective_rank(update))
    assert figures.norm == pytest.approx(update.norm().item())
    U, values, Vh = torch.linalg.svd(update, full_matrices=False)
    errors = [(update - U[:, :k] * values[:k] @ Vh[:k]).norm() / update.norm() for k in range(10)]
    assert figures.adapter_rank == next(k for k, error in enumerate(errors) if error <= 1e-3)
    assert update_figures(values, rtol=0.2).adapter_rank == next(k for k, error in enumerate(errors) if error <= 0.2)


def test_an_update_of_low_rank_and_a_zero_one():
    update = matrix(20, 3) @ matrix(3, 15, seed=1)
    assert update_figures(torch.linalg.svdvals(update))[::3] == (3, 3)
    assert update_figures(torch.zeros(5)) == (0, 0.0, 0.0, 0)


@pytest.mark.parametrize("name", CASES)
def test_residuals_agree_with_the_independent_solver(name):
    G, A, B = case(name)
    residuals = step_residuals(G, A, B)
    for kind, key in (("column", "column"), ("scalar", "scalar"), ("oracle", "svd")):
        assert getattr(residuals, kind) == pytest.approx(VECTORS[f"{name}.residual_{key}"].item(), abs=1e-8)
    assert residuals.none == pytest.approx(left_of(G, A, B, 1, 1).item())
    assert residuals.oracle <= residuals.column <= residuals.scalar <= residuals.none
    assert residuals.oracle <= residuals.matrix <= min(residuals.column, residuals.polar) + 1e-9
    orthonormal = (torch.linalg.qr(factor)[0] for factor in (A, B))
    assert residuals.polar == pytest.approx(left_of(G, *orthonormal, 1, 1).item())
    column_taken = (VECTORS[f"{name}.v_column"] > 0).all() and abs(residuals.chosen - residuals.column) < 1e-8
    scalar_taken = (VECTORS[f"{name}.v_scalar"] > 0).all() and abs(residuals.chosen - residuals.scalar) < 1e-8
    assert column_taken or scalar_taken or residuals.chosen == residuals.none


def chosen_kind(residuals):
    kinds = [kind for kind in ("none", "scalar", "column") if abs(getattr(residuals, kind) - residuals.chosen) < 1e-12]
    assert len(kinds) == 1
    return kinds[0]


@pytest.mark.slow
def test_what_is_chosen_is_the_best_positive_scaling_that_the_mode_allows():
    found = {}
    for seed in range(60):
        G, A, B = matrix(12, 10, seed=seed), matrix(12, 4, seed=100 + seed), matrix(10, 4, seed=200 + seed)
        A = A + 3 * A[:, :1]  # columns that are nearly the same are not all wanted
        v_column = scalora.column_scaling(A, B, G @ B, G.mT @ A)
        v_scalar = scalora.scalar_scaling(A, B, G @ B, G.mT @ A)
        for mode in ("auto", "column", "scalar"):
            expected = "none"
            if mode != "column" and (v_scalar > 0).all():
                expected = "scalar"
            if mode != "scalar" and (v_column > 0).all():
                expected = "column"
            assert chosen_kind(step_residuals(G, A, B, mode=mode)) == expected
            found.setdefault(mode, set()).add(expected)
    assert found["auto"] >= {"scalar", "column"}
    assert found["column"] == {"none", "column"}
    assert found["scalar"] == {"scalar"}


@pytest.mark.parametrize(("optimum", "kind"), [("polar", "polar"), ("exact", "matrix")])
def test_what_is_chosen_in_the_mode_of_matrices(optimum, kind):
    G, A, B = matrix(12, 10), matrix(12, 3, seed=1), matrix(10, 3, seed=2)
    residuals = step_residuals(G, A, B, mode="matrix", optimum=optimum, target_norm=3.0)
    assert residuals.chosen == pytest.approx(getattr(residuals, kind), abs=1e-6)
    assert residuals.chosen < residuals.none
    left_alone = step_residuals(G, 0 * A, B, mode="matrix", optimum=optimum, target_norm=3.0)
    assert left_alone.chosen == left_alone.none


def test_the_target_norm_is_the_size_of_the_step_of_the_adapter_as_it_is():
    G, A, B = matrix(12, 10), matrix(12, 3, seed=1), matrix(10, 3, seed=2)
    for norm in (0.5, 1.0, 4.0):
        residuals = step_residuals(G, A, B, target_norm=norm)
        assert residuals.none == pytest.approx(left_of(G, A, B, 1, 1, smoothness_rate=norm**-2).item())
        assert residuals[1:] == pytest.approx(step_residuals(G, A, B)[1:])


def test_the_oracle_may_have_another_rank():
    G, A, B = matrix(12, 10), matrix(12, 2, seed=1), matrix(10, 2, seed=2)
    energy = torch.linalg.svdvals(G).square()
    assert step_residuals(G, A, B).oracle == pytest.approx((energy[4:].sum() / energy.sum()).item())
    assert step_residuals(G, A, B, oracle_rank=4).oracle == pytest.approx((energy[8:].sum() / energy.sum()).item())
    assert step_residuals(G, A, B, oracle_rank=40).oracle == 0


@pytest.mark.parametrize(("value", "named"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (0.0, "zero")])
def test_a_gradient_without_a_residual_is_refused(value, named):
    with pytest.raises(ValueError, match=named):
        step_residuals(torch.full((6, 5), value), torch.ones(6, 1), torch.ones(5, 1))
