"""The kinds of scaling (paper, section 3). No tensors, so that settings can be read without loading torch."""

from __future__ import annotations

from typing import Literal

Mode = Literal["auto", "column", "scalar", "matrix"]
"""Which scalings a rescale may use. ``"auto"`` is the paper's rule: column scaling where its optimum is positive, else
scalar scaling where that one is, else none. ``"column"`` and ``"scalar"`` try only the one. ``"matrix"`` is beyond the
paper: any r × r change of the factors (`scalora.maths.matrix`)."""

Optimum = Literal["polar", "exact"]
"""Which matrices a matrix scaling takes: those that make both factors orthonormal, or those that minimise the bound."""

LEFT_ALONE, SCALAR, COLUMN, MATRIX = 0, 1, 2, 3
"""Values of `scalora.maths.scaling.Scaling.choice`: how a layer was scaled."""
