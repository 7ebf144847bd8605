"""Means, over the test vectors, of the share of the gradient that a step leaves uncaptured with each kind of scaling.

    python benchmarks/scaling_residuals.py

Prints the table of docs/method.md, from tests/data/scaling.safetensors: a column for each kind of scaling, and the mean
over the vectors of each kind of layer and over all of them. "polar, best length" are orthonormal factors of the norms
that are best for this gradient, one for A and one for B, instead of 1/√(Lη).
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import scalora
from scalora.maths.residuals import step_residuals

VECTORS = Path(__file__).parents[1] / "tests" / "data" / "scaling.safetensors"
KINDS = {
    "gauss": "Gaussian A, B and G",
    "lowrank_noise": "G of rank r and noise",
    "illcond": "ill-conditioned A and B",
}


def polar_of_best_length(G: Tensor, A: Tensor, B: Tensor) -> float:
    """The residual of orthonormal factors after scalar scaling."""
    U_A, U_B = (torch.linalg.qr(factor)[0] for factor in (A, B))
    v = scalora.scalar_scaling(U_A, U_B, G @ U_B, G.mT @ U_A)
    return float(scalora.relative_residual(G, U_A, U_B, v))


def main() -> None:
    """Print the table."""
    vectors = load_file(VECTORS)
    of_kind: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    for name in sorted({key.split(".")[0] for key in vectors}):
        G, A, B = (vectors[f"{name}.{key}"] for key in "GAB")
        found = step_residuals(G, A, B)
        row = [found.scalar, found.column, found.polar, polar_of_best_length(G, A, B), found.matrix, found.oracle]
        of_kind[next(kind for kind in KINDS if kind in name)].append(row)
    print("| mean residual | scalar | column | polar | polar, best length | best r × r | oracle |")
    print("|---|---|---|---|---|---|---|")
    everything = [row for rows in of_kind.values() for row in rows]
    for title, rows in {**{KINDS[kind]: rows for kind, rows in of_kind.items()}, "all": everything}.items():
        means = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
        print(f"| {title} ({len(rows)}) | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")


if __name__ == "__main__":
    main()
