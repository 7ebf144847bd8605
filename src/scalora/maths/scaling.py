"""The optimal scaling of a LoRA adapter (ScaLoRA, arXiv 2510.23818, section 3): tensors only.

Notation is the paper's: the layer's weight is ``W (m × n)``, the adapter adds ``A Bᵀ`` with ``A (m × r)`` (PEFT's
``lora_B.weight``) and ``B (n × r)`` (PEFT's ``lora_A.weight`` transposed). ``G = ∂ℓ/∂W`` is the full gradient, which is
never formed: LoRA's own gradients are ``GB = G·B`` and ``GtA = Gᵀ·A``, up to the adapter's scaling s.

One gradient step on ``Ã = A·diag(α)``, ``B̃ = B·diag(β)`` moves W by ``−η(G B̃B̃ᵀ + ÃÃᵀ G)``. With
``v = Lη·[α²; β²]`` the loss bound of an L-smooth loss is a least squares in v over 2r rank-one matrices:

    minimise ‖G − Σᵢ vᵢ·aᵢ(Gᵀaᵢ)ᵀ − Σⱼ v₍ᵣ₊ⱼ₎·(G bⱼ)bⱼᵀ‖²      whose normal equations are  M v = λ.

Everything is batched over leading dimensions, so that layers of one shape are solved together, and has no
data-dependent branches. Inputs may be of any floating-point dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from scalora.maths.mode import COLUMN, LEFT_ALONE, SCALAR, Mode

# The relative error of v is about eps / pivot, where pivot is the smallest squared Cholesky pivot of the unit-diagonal
# system. Below this pivot, fewer than about four digits of v are correct in float64: v is no longer an optimum.
_SMALLEST_PIVOT = 1e-12

# A factor outside this range has a square below 1e-12 or above 1e12, which pushes float32 second moments (typically
# 1e-16 … 1e-4) out of range. The lower end implements the paper's "never zero a column".
FACTOR_RANGE = (1e-6, 1e6)

# Rows that one processor of a GPU sums over: with 24 layers and 2,048 rows, some 200 pieces for 132 processors.
_ROWS_OF_PIECE = 256


class Grams(NamedTuple):
    """Inner products of the columns of ``S_A = [A, GB]`` and of ``S_B = [GtA, B]``, which determine the optimum.

    Attributes:
        left: S_AᵀS_A, (…, 2r, 2r), in the solver's dtype.
        right: S_BᵀS_B, (…, 2r, 2r), in the solver's dtype.
    """

    left: Float[Tensor, "*layers k k"]
    right: Float[Tensor, "*layers k k"]

    @property
    def of_factors(self) -> tuple[Float[Tensor, "*layers r r"], Float[Tensor, "*layers r r"]]:
        """``AᵀA`` and ``BᵀB``, (…, r, r) each."""
        r = self.left.shape[-1] // 2
        return self.left[..., :r, :r], self.right[..., r:, r:]


class NormalEquations(NamedTuple):
    """The system ``M v = λ`` of the column scaling.

    Attributes:
        matrix: M, (…, 2r, 2r), symmetric positive semi-definite, in the solver's dtype.
        rhs: λ, (…, 2r), in the solver's dtype.
        usable: whether the layer's inputs are finite and none of the 2r rank-one matrices is zero, (…).
        finite: whether the layer's inputs are finite, (…).
    """

    matrix: Float[Tensor, "*layers k k"]
    rhs: Float[Tensor, "*layers k"]
    usable: Bool[Tensor, "*layers"]
    finite: Bool[Tensor, "*layers"]


class Scaling(NamedTuple):
    """The factors for each layer at one step, and how they were chosen.

    Attributes:
        alpha: factors of A's columns, (…, r), positive; exactly 1 for a layer that is left alone.
        beta: factors of B's columns, (…, r), positive; exactly 1 for a layer that is left alone.
        choice: `COLUMN`, `SCALAR` or `LEFT_ALONE` for each layer, (…).
        degenerate: whether a layer was left alone because its inputs have no optimum (a zero column in A, B, G·B or
            Gᵀ·A, or non-finite entries) rather than because its optimum is negative or out of range, (…).
        nonfinite: whether a layer was left alone because of NaN or infinite entries, (…).
        exploding: whether a layer was left alone because the factors of its optimum, although positive, are too far
            from 1 to be applied, (…).
    """

    alpha: Float[Tensor, "*layers r"]
    beta: Float[Tensor, "*layers r"]
    choice: Int[Tensor, "*layers"]
    degenerate: Bool[Tensor, "*layers"]
    nonfinite: Bool[Tensor, "*layers"]
    exploding: Bool[Tensor, "*layers"]

    def unless(self, skipped: Bool[Tensor, ""]) -> Scaling:
        """Leave every layer alone if the optimizer skips its step. Does not wait for the device.

        Args:
            skipped: whether the step is skipped; a scalar on the device of the factors.

        Returns:
            This scaling, or one with all factors 1 if `skipped`.
        """
        return Scaling(
            torch.where(skipped, 1.0, self.alpha),
            torch.where(skipped, 1.0, self.beta),
            torch.where(skipped, LEFT_ALONE, self.choice),
            degenerate=self.degenerate & ~skipped,
            nonfinite=self.nonfinite & ~skipped,
            exploding=self.exploding & ~skipped,
        )


def solver_dtype(device: torch.device) -> torch.dtype:
    """The dtype to solve in: float64 where the device has it, because the equations square the condition number.

    Args:
        device: the device of the tensors.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def grams(
    A: Float[Tensor, "*layers m r"],
    B: Float[Tensor, "*layers n r"],
    GB: Float[Tensor, "*layers m r"],
    GtA: Float[Tensor, "*layers n r"],
) -> Grams:
    """The inner products that determine the optimum, at a cost of O((m + n)·r²) and without forming G.

    Args:
        A: PEFT's ``lora_B.weight``, (…, m, r), any float dtype.
        B: PEFT's ``lora_A.weight`` transposed, (…, n, r), any float dtype.
        GB: ``G·B``, (…, m, r): the gradient of ``lora_B.weight``, divided by PEFT's scaling s.
        GtA: ``Gᵀ·A``, (…, n, r): the transposed gradient of ``lora_A.weight``, divided by PEFT's scaling s.

    Returns:
        ``[A, GB]ᵀ[A, GB]`` and ``[GtA, B]ᵀ[GtA, B]``, in the solver's dtype.

    Raises:
        ValueError: the four shapes don't match.
    """
    _check_shapes(A, B, GB, GtA)
    return Grams(_gram_of_both(A, GB), _gram_of_both(GtA, B))


def normal_equations(
    A: Float[Tensor, "*layers m r"],
    B: Float[Tensor, "*layers n r"],
    GB: Float[Tensor, "*layers m r"],
    GtA: Float[Tensor, "*layers n r"],
) -> NormalEquations:
    """The normal equations ``M v = λ`` of the column scaling.

    ``M = (S_AᵀS_A) ⊙ (S_BᵀS_B)`` with ``S_A = [A, GB]`` and ``S_B = [GtA, B]``; ``λ = [‖Gᵀaᵢ‖²; ‖G bⱼ‖²]``.

    Args:
        A: PEFT's ``lora_B.weight``, (…, m, r), any float dtype.
        B: PEFT's ``lora_A.weight`` transposed, (…, n, r), any float dtype.
        GB: ``G·B``, (…, m, r): the gradient of ``lora_B.weight``, divided by PEFT's scaling s.
        GtA: ``Gᵀ·A``, (…, n, r): the transposed gradient of ``lora_A.weight``, divided by PEFT's scaling s.

    Returns:
        M and λ. Layers that are not `usable` (zero or non-finite input) get the identity and λ = 0, which every solver
        takes without producing a NaN.

    Raises:
        ValueError: the four shapes don't match.
    """
    return equations_of_grams(grams(A, B, GB, GtA))


def equations_of_grams(grams: Grams) -> NormalEquations:
    """The normal equations ``M v = λ`` of the column scaling, from known inner products.

    Args:
        grams: the inner products of the layers.

    Returns:
        M and λ. Layers that are not `usable` (zero or non-finite input) get the identity and λ = 0, which every solver
        takes without producing a NaN.
    """
    left, right = grams
    r = left.shape[-1] // 2
    # The square of a column with a NaN or infinity is not finite either: no need to check the columns themselves.
    finite = (left.isfinite() & right.isfinite()).all(-1).all(-1)
    matrix = left * right
    # λᵢ = ⟨G, aᵢ(Gᵀaᵢ)ᵀ⟩ = ‖Gᵀaᵢ‖² and ⟨G, (G bⱼ)bⱼᵀ⟩ = ‖G bⱼ‖².
    rhs = torch.cat([right.diagonal(dim1=-2, dim2=-1)[..., :r], left.diagonal(dim1=-2, dim2=-1)[..., r:]], dim=-1)
    usable = finite & (matrix.diagonal(dim1=-2, dim2=-1) > 0).all(-1) & matrix.isfinite().all(-1).all(-1)
    identity = torch.eye(2 * r, dtype=matrix.dtype, device=matrix.device)
    matrix = torch.where(usable[..., None, None], matrix, identity)
    return NormalEquations(matrix, torch.where(usable[..., None], rhs, 0), usable, finite)


def column_scaling(
    A: Float[Tensor, "*layers m r"],
    B: Float[Tensor, "*layers n r"],
    GB: Float[Tensor, "*layers m r"],
    GtA: Float[Tensor, "*layers n r"],
) -> Float[Tensor, "*layers 2*r"]:
    """The unconstrained optimum ``v = Lη·[α²; β²]`` with a factor for each column.

    Args:
        A: PEFT's ``lora_B.weight``, (…, m, r), any float dtype.
        B: PEFT's ``lora_A.weight`` transposed, (…, n, r), any float dtype.
        GB: ``G·B``, (…, m, r). Any common positive factor of GB and GtA is allowed: the result does not depend on it.
        GtA: ``Gᵀ·A``, (…, n, r), up to the same factor.

    Returns:
        v, (…, 2r), in float64 (float32 on devices without it). Where v ≥ 0 it is the global optimum. A layer without an
        optimum (zero or non-finite input, singular system) gets zeros, which `choose_scaling` rejects; never NaN.

    Raises:
        ValueError: the four shapes don't match.
    """
    equations = normal_equations(A, B, GB, GtA)
    v, _ = _solve(equations.matrix, equations.rhs)
    return v


def scalar_scaling(
    A: Float[Tensor, "*layers m r"],
    B: Float[Tensor, "*layers n r"],
    GB: Float[Tensor, "*layers m r"],
    GtA: Float[Tensor, "*layers n r"],
) -> Float[Tensor, "*layers 2"]:
    """The unconstrained optimum ``v = Lη·[α²; β²]`` with one factor for A and one for B.

    It solves the column system summed over its blocks: the sums of M are ``‖AAᵀG‖²``, ``‖AᵀGB‖²`` and ``‖GBBᵀ‖²``.

    Args:
        A: PEFT's ``lora_B.weight``, (…, m, r), any float dtype.
        B: PEFT's ``lora_A.weight`` transposed, (…, n, r), any float dtype.
        GB: ``G·B``, (…, m, r). Any common positive factor of GB and GtA is allowed: the result does not depend on it.
        GtA: ``Gᵀ·A``, (…, n, r), up to the same factor.

    Returns:
        v, (…, 2), in float64 (float32 on devices without it). Where v ≥ 0 it is the global optimum. A layer without an
        optimum (zero or non-finite input, singular system) gets zeros, which `choose_scaling` rejects; never NaN.

    Raises:
        ValueError: the four shapes don't match.
    """
    v, _ = _solve(*_summed_over_blocks(normal_equations(A, B, GB, GtA)))
    return v


def choose_scaling(
    A: Float[Tensor, "*layers m r"],
    B: Float[Tensor, "*layers n r"],
    GB: Float[Tensor, "*layers m r"],
    GtA: Float[Tensor, "*layers n r"],
    *,
    target_norm: float | Float[Tensor, "*layers 2"],
    mode: Mode = "auto",
) -> Scaling:
    """The factors to use: the column optimum if it is positive, else the scalar one if it is, else ones.

    Args:
        A: PEFT's ``lora_B.weight``, (…, m, r), any float dtype.
        B: PEFT's ``lora_A.weight`` transposed, (…, n, r), any float dtype.
        GB: ``G·B``, (…, m, r). Any common positive factor of GB and GtA is allowed: the result does not depend on it.
        GtA: ``Gᵀ·A``, (…, n, r), up to the same factor.
        target_norm: ``1/√(Lη)``, in ``[α; β] = √v · target_norm``. One number for all, or (…, 2) with one for α and one
            for β, for factors that are trained with different learning rates.
        mode: ``"auto"`` is the paper's rule; ``"column"`` and ``"scalar"`` try only the one.

    Returns:
        The factors and how they were chosen. A layer without a usable optimum is left alone, with factors of exactly 1.

    Raises:
        ValueError: the four shapes don't match, or the mode is ``"matrix"``, which has no factors of columns.
    """
    return scaling_of_grams(grams(A, B, GB, GtA), target_norm=target_norm, mode=mode)


def scaling_of_grams(grams: Grams, *, target_norm: float | Float[Tensor, "*layers 2"], mode: Mode = "auto") -> Scaling:
    """The factors to use for layers whose inner products are known, as `choose_scaling` chooses them.

    Args:
        grams: the inner products of the layers.
        target_norm: ``1/√(Lη)``, in ``[α; β] = √v · target_norm``. One number for all, or (…, 2) with one for α and one
            for β, for factors that are trained with different learning rates.
        mode: ``"auto"`` is the paper's rule; ``"column"`` and ``"scalar"`` try only the one.

    Returns:
        The factors and how they were chosen. A layer without a usable optimum is left alone, with factors of exactly 1.

    Raises:
        ValueError: the mode is ``"matrix"``, which has no factors of columns.
    """
    if mode == "matrix":
        raise ValueError(
            "mode='matrix' changes factors by matrices, not column by column: use matrix_scaling_of_grams, or the mode "
            "'auto', 'column' or 'scalar'"
        )
    equations = equations_of_grams(grams)
    r = equations.rhs.shape[-1] // 2
    norms = torch.as_tensor(target_norm, dtype=equations.rhs.dtype, device=equations.rhs.device)
    norms = norms.expand(*equations.rhs.shape[:-1], 2).repeat_interleave(r, dim=-1)

    column, column_positive, column_ok = _factors(*_solve(equations.matrix, equations.rhs), norms)
    scalar_v, scalar_regular = _solve(*_summed_over_blocks(equations))
    scalar, scalar_positive, scalar_ok = _factors(scalar_v.repeat_interleave(r, dim=-1), scalar_regular, norms)
    column_tried, scalar_tried = equations.usable & (mode != "scalar"), equations.usable & (mode != "column")
    column_ok = column_ok & column_tried
    scalar_ok = scalar_ok & scalar_tried & ~column_ok
    positive = (column_positive & column_tried) | (scalar_positive & scalar_tried)

    factors = torch.where(scalar_ok[..., None], scalar, 1.0)
    factors = torch.where(column_ok[..., None], column, factors)
    choice = COLUMN * column_ok.int() + SCALAR * scalar_ok.int()
    return Scaling(
        factors[..., :r],
        factors[..., r:],
        choice,
        degenerate=~equations.usable,
        nonfinite=~equations.finite,
        exploding=positive & (choice == LEFT_ALONE),
    )


def _gram_of_both(
    first: Float[Tensor, "*layers rows r"], second: Float[Tensor, "*layers rows r"]
) -> Float[Tensor, "*layers 2*r 2*r"]:
    """Inner products of the columns of ``[first, second]``."""
    dtype = solver_dtype(first.device)
    if first.is_cuda:
        return _gram_in_pieces(first, second, dtype)
    # Block by block, without concatenating the two.
    first, second = first.to(dtype), second.to(dtype)
    mixed = first.mT @ second
    upper, lower = torch.cat([first.mT @ first, mixed], -1), torch.cat([mixed.mT, second.mT @ second], -1)
    return torch.cat([upper, lower], -2)


def _gram_in_pieces(
    first: Float[Tensor, "*layers rows r"], second: Float[Tensor, "*layers rows r"], dtype: torch.dtype
) -> Float[Tensor, "*layers 2*r 2*r"]:
    """Inner products that are summed piece by piece, so that a GPU has work for all of its processors.

    Of a batch of narrow products with long sums, each is computed by a single one.
    """
    *layers, rows, r = first.shape
    count = -(-rows // _ROWS_OF_PIECE)  # may be 0: a process may have none of a layer's rows
    # Filled in place: this copy is the largest tensor of a rescale, and there should be one of it.
    columns = first.new_zeros(*layers, count * _ROWS_OF_PIECE, 2 * r, dtype=dtype)
    columns[..., :rows, :r], columns[..., :rows, r:] = first, second
    pieces = columns.view(*layers, count, _ROWS_OF_PIECE, 2 * r)
    total: Tensor = (pieces.mT @ pieces).sum(-3)
    return total


def _solve(
    matrix: Float[Tensor, "*layers k k"], rhs: Float[Tensor, "*layers k"]
) -> tuple[Float[Tensor, "*layers k"], Bool[Tensor, "*layers"]]:
    """Solve by Cholesky after Jacobi scaling, with one step of refinement; zeros where M is not positive definite.

    Returns the solution, and whether the system is regular enough for it to be an optimum.
    """
    scale = matrix.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(matrix.dtype).tiny).rsqrt()
    unit = matrix * scale[..., :, None] * scale[..., None, :]
    rhs = (rhs * scale)[..., None]
    factor, info = torch.linalg.cholesky_ex(unit)
    definite = info == 0
    factor = torch.where(
        definite[..., None, None], factor, torch.eye(unit.shape[-1], dtype=unit.dtype, device=unit.device)
    )
    x = _substitute(factor, rhs)
    x = x + _substitute(factor, rhs - unit @ x)
    v = x[..., 0] * scale
    definite = definite & v.isfinite().all(-1)
    pivot = factor.diagonal(dim1=-2, dim2=-1).amin(-1).square()
    return torch.where(definite[..., None], v, 0), definite & (pivot > _SMALLEST_PIVOT)


def _substitute(
    factor: Float[Tensor, "*layers k k"], rhs: Float[Tensor, "*layers k 1"]
) -> Float[Tensor, "*layers k 1"]:
    """Solve with a Cholesky factor. `torch.cholesky_solve` allocates on a GPU, which waits and can't be captured."""
    solve = torch.linalg.solve_triangular
    solution: Tensor = solve(factor.mT, solve(factor, rhs, upper=False), upper=True)
    return solution


def _summed_over_blocks(
    equations: NormalEquations,
) -> tuple[Float[Tensor, "*layers 2 2"], Float[Tensor, "*layers 2"]]:
    r = equations.rhs.shape[-1] // 2
    layers = equations.rhs.shape[:-1]
    blocks = equations.matrix.reshape(*layers, 2, r, 2, r).sum((-3, -1))
    return blocks, equations.rhs.reshape(*layers, 2, r).sum(-1)


def _factors(
    v: Float[Tensor, "*layers k"], regular: Bool[Tensor, "*layers"], norms: Float[Tensor, "*layers k"]
) -> tuple[Float[Tensor, "*layers k"], Bool[Tensor, "*layers"], Bool[Tensor, "*layers"]]:
    """The factors of v, whether v is a positive optimum, and whether the factors are also in range."""
    factors = v.clamp_min(0).sqrt() * norms
    low, high = FACTOR_RANGE
    positive = regular & (v > 0).all(-1)
    return factors, positive, positive & ((factors > low) & (factors < high)).all(-1)


def _check_shapes(A: Tensor, B: Tensor, GB: Tensor, GtA: Tensor) -> None:
    if A.shape != GB.shape or B.shape != GtA.shape or A.shape[-1] != B.shape[-1] or A.shape[:-2] != B.shape[:-2]:
        raise ValueError(
            "A and GB must both be of shape (…, m, r), B and GtA both of shape (…, n, r); got "
            f"A {tuple(A.shape)}, B {tuple(B.shape)}, GB {tuple(GB.shape)}, GtA {tuple(GtA.shape)}"
        )
