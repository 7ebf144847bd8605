"""What a rescale changes: ``Ã = A·P``, ``B̃ = B·Q``, with diagonal matrices (the paper's) or any; tensors only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from scalora.maths.matrix import MatrixScaling
from scalora.maths.scaling import Scaling
from scalora.rescale.kernels import Kernels
from scalora.rescale.remainder import Remainder
from scalora.rescale.transport import multiply_by_matrices


class Part(NamedTuple):
    """What is merged into at once: the weights of layers of one shape, or a rectangle of each.

    Attributes:
        weights: the layers' base weights, as they are stored, or the part of them that is here.
        remainders: the layers' remainders, of the same part.
        rows: which rows of W that part is, of those that lora_B has.
        columns: which columns of W, of those that lora_A has.
        device: where the part is, if the factors may be elsewhere.
    """

    weights: Sequence[Tensor]
    remainders: Sequence[Remainder]
    rows: slice = slice(None)
    columns: slice = slice(None)
    device: torch.device | None = None


class Factors(NamedTuple):
    """The tensors of layers of one shape that a rescale changes.

    Attributes:
        lora_A: the layers' ``lora_A`` weights, the paper's Bᵀ.
        lora_B: the layers' ``lora_B`` weights, the paper's A.
        parts: the parts of the layers' base weights that are here.
    """

    lora_A: Sequence[Tensor]
    lora_B: Sequence[Tensor]
    parts: Sequence[Part]

    def merge(self, kernels: Kernels, left: Sequence[Tensor], coefficients: Float[Tensor, "layers r"]) -> None:
        """Add ``left · diag(coefficients) · lora_A`` to the remainders.

        Args:
            kernels: the operations to use.
            left: (m, r) of each layer.
            coefficients: (layers, r).
        """
        for part in self.parts:
            rows, columns = list(left), list(self.lora_A)
            if part.rows != slice(None):
                rows = [of_layer[part.rows] for of_layer in rows]
            if part.columns != slice(None):
                columns = [of_layer[:, part.columns] for of_layer in columns]
            if part.device is not None:
                rows, columns = ([t.to(part.device) for t in factors] for factors in (rows, columns))
                coefficients = coefficients.to(part.device)
            kernels.merge(part.remainders, part.weights, rows, columns, coefficients)


class ColumnChange(NamedTuple):
    """``P = diag(α)``, ``Q = diag(β)``.

    Attributes:
        alpha: (layers, r), in the dtype of the factors.
        beta: (layers, r), in the dtype of the factors.
        merged: 1 − αβ, (layers, r), in the solver's dtype.
    """

    alpha: Float[Tensor, "layers r"]
    beta: Float[Tensor, "layers r"]
    merged: Float[Tensor, "layers r"]

    @classmethod
    def of(cls, scaling: Scaling, dtype: torch.dtype) -> ColumnChange:
        """The change of a scaling.

        Args:
            scaling: the factors, in the solver's dtype.
            dtype: dtype of the adapter.
        """
        alpha, beta = scaling.alpha.to(dtype), scaling.beta.to(dtype)
        # 1 − αβ of the rounded factors, in the solver's precision, so that the function changes only by rounding.
        return cls(alpha, beta, 1 - alpha.to(scaling.alpha.dtype) * beta.to(scaling.beta.dtype))

    @property
    def merged_matrix(self) -> Float[Tensor, "layers r r"]:
        """``1 − P·Qᵀ``."""
        return torch.diag_embed(self.merged)

    def as_matrices(self) -> MatrixChange:
        """The same change, for optimizers with a state that only matrices can carry over."""
        P, Q = (torch.diag_embed(factors.to(self.merged.dtype)) for factors in (self.alpha, self.beta))
        return MatrixChange.by(P, Q, self.merged_matrix)

    def apply(self, factors: Factors, kernels: Kernels, scaling: Float[Tensor, "layers 1"]) -> None:
        """Move what the change takes out of the factors to the remainders, and change the factors, in place.

        Args:
            factors: layers of one shape.
            kernels: the operations to use.
            scaling: what each layer's remainder is added at.
        """
        lora_A, lora_B = list(factors.lora_A), list(factors.lora_B)
        factors.merge(kernels, lora_B, scaling * self.merged)
        kernels.multiply(lora_B, kernels.expand_factors(self.alpha[:, None, :], lora_B))
        kernels.multiply(lora_A, kernels.expand_factors(self.beta[:, :, None], lora_A))


class MatrixChange(NamedTuple):
    """Any invertible P and Q.

    Attributes:
        P: (layers, r, r), in the solver's dtype.
        Q: (layers, r, r), in the solver's dtype.
        merged_matrix: ``1 − P·Qᵀ``, (layers, r, r), in the solver's dtype.
        inverse_of_Q: (layers, r, r), in the solver's dtype.
        changed: whether P or Q is another matrix than 1, (layers,).
    """

    P: Float[Tensor, "layers r r"]
    Q: Float[Tensor, "layers r r"]
    merged_matrix: Float[Tensor, "layers r r"]
    inverse_of_Q: Float[Tensor, "layers r r"]
    changed: Bool[Tensor, " layers"]

    @classmethod
    def of(cls, scaling: MatrixScaling) -> MatrixChange:
        """The change of a scaling.

        Args:
            scaling: the matrices, in the solver's dtype.
        """
        P, Q = scaling.P, scaling.Q
        return cls.by(P, Q, torch.eye(P.shape[-1], dtype=P.dtype, device=P.device) - P @ Q.mT)

    @classmethod
    def by(cls, P: Tensor, Q: Tensor, merged_matrix: Tensor) -> MatrixChange:
        """The change by two matrices of each layer.

        Args:
            P: (layers, r, r), in the solver's dtype.
            Q: (layers, r, r), in the solver's dtype.
            merged_matrix: ``1 − P·Qᵀ``, (layers, r, r), in the solver's dtype.
        """
        identity = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
        changed = (P.ne(identity) | Q.ne(identity)).any(-1).any(-1)
        return cls(P, Q, merged_matrix, torch.linalg.inv_ex(Q).inverse, changed)

    def apply(self, factors: Factors, kernels: Kernels, scaling: Float[Tensor, "layers 1"]) -> None:
        """Move what the change takes out of the factors to the remainders, and change the factors, in place.

        Args:
            factors: layers of one shape.
            kernels: the operations to use.
            scaling: what each layer's remainder is added at.
        """
        A = torch.stack(list(factors.lora_B)).to(self.P.dtype)
        new_A = multiply_by_matrices(factors.lora_B, self.P, self.changed, tall=True)
        multiply_by_matrices(factors.lora_A, self.Q, self.changed, tall=False)
        # A·Bᵀ − Ã·B̃ᵀ as (A·Q⁻ᵀ − Ã)·B̃ᵀ, with Ã and B̃ as they have been rounded. With A·(1 − P·Qᵀ)·Bᵀ the rounding
        # errors would grow with the condition number of B, which that of B̃ does not.
        left = A @ self.inverse_of_Q.mT - new_A.to(A.dtype)
        left = (scaling[..., None] * left).to(factors.lora_A[0].dtype)
        moved = self.changed[:, None].expand(-1, left.shape[-1])
        factors.merge(kernels, list(left.unbind()), moved.to(self.P.dtype))


Change = ColumnChange | MatrixChange
"""What a rescale changes in layers of one rank or of one shape."""


def split(change: Change, sizes: list[int]) -> list[Change]:
    """The changes of consecutive groups of layers.

    Args:
        change: the change of all layers.
        sizes: number of layers of each group.
    """
    return [type(change)(*parts) for parts in zip(*(torch.split(t, sizes) for t in change), strict=True)]
