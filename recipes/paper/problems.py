"""Regression problems whose solution is a high-rank update, out of reach for low-rank adaptation.

The student starts at the teacher's weights minus an update Δ of rank 32 with slowly decaying singular values,
σᵢ = i^(−1/2). Plain LoRA of rank 4 can learn at most the four largest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

UPDATE_RANK = 32
_BATCH = 64
_NOISE = 0.05


def slowly_decaying_update(m: int, n: int, generator: torch.Generator, rank: int = UPDATE_RANK) -> Tensor:
    """A random (m, n) matrix of the given rank with singular values 1, 2^(−1/2), …, rank^(−1/2)."""
    U, _ = torch.linalg.qr(torch.randn(m, rank, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(n, rank, generator=generator))
    return (U * torch.arange(1, rank + 1) ** -0.5) @ V.T


class LinearProblem:
    """``y = (W₀ + Δ)x + noise`` with W₀ 64 × 96 and inputs whose covariance has eigenvalues from 1 to 0.1, so L = 1.

    Args:
        seed: seeds the weights, the update and the batches.
        exact: make every batch the whole distribution without noise, so that its gradient is the gradient of the risk.

    Attributes:
        floor: exact risk of the best update of each rank 0, 1, …, relative to that at the start (Eckart and Young).
    """

    def __init__(self, seed: int, *, exact: bool = False) -> None:
        outputs, inputs = 64, 96
        self._exact = exact
        self._generator = torch.Generator().manual_seed(seed)
        self._weight = torch.randn(outputs, inputs, generator=self._generator) / inputs**0.5
        update = slowly_decaying_update(outputs, inputs, self._generator)
        self._teacher = self._weight + update
        basis, _ = torch.linalg.qr(torch.randn(inputs, inputs, generator=self._generator))
        self._root = basis * torch.logspace(0, -0.5, inputs) @ basis.T
        # A quadratic form averaged over the rows of √n·Σ^(1/2) has the same mean as over the input distribution.
        self._evaluation = inputs**0.5 * self._root
        energy = torch.linalg.svdvals(update @ self._root).square()
        self._start = float(energy.sum())
        self.floor = [1 - float(energy[:rank].sum()) / self._start for rank in range(UPDATE_RANK + 1)]

    def student(self) -> nn.Module:
        """A new student: one linear layer at W₀."""
        outputs, inputs = self._weight.shape
        layer = nn.Linear(inputs, outputs, bias=False)
        layer.weight.data.copy_(self._weight)
        return nn.Sequential(layer)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Draw fresh inputs and noisy outputs."""
        if self._exact:
            return self._evaluation, self._evaluation @ self._teacher.T
        x = torch.randn(_BATCH, len(self._root), generator=self._generator) @ self._root
        y = x @ self._teacher.T
        return x, y + _NOISE * torch.randn(y.shape, generator=self._generator)

    @torch.no_grad()
    def risk(self, model: nn.Module) -> float:
        """Exact expected squared error without the noise, relative to that at the start."""
        error = model(self._evaluation) - self._evaluation @ self._teacher.T
        return float(error.square().sum(1).mean()) / self._start


class TwoLayerProblem:
    """The same for a two-layer teacher: linear (48 × 64), tanh, linear (48 × 48), each layer with its own Δ.

    Args:
        seed: seeds the weights, the updates and the batches.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        shapes = [(48, 64), (48, 48)]
        self._weights = [torch.randn(m, n, generator=self._generator) / n**0.5 for m, n in shapes]
        self._teacher = [w + slowly_decaying_update(*w.shape, self._generator) for w in self._weights]
        self._evaluation = torch.randn(1024, 64, generator=self._generator)
        self._answers = self._outputs(self._evaluation)
        with torch.no_grad():
            self._start = float((self.student()(self._evaluation) - self._answers).square().sum(1).mean())

    def _outputs(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self._teacher[0].T) @ self._teacher[1].T

    def student(self) -> nn.Module:
        """A new student: the two layers at their initial weights."""
        layers = [nn.Linear(w.shape[1], w.shape[0], bias=False) for w in self._weights]
        for layer, weight in zip(layers, self._weights, strict=True):
            layer.weight.data.copy_(weight)
        return nn.Sequential(layers[0], nn.Tanh(), layers[1])

    def batch(self) -> tuple[Tensor, Tensor]:
        """Draw fresh inputs and noisy outputs."""
        x = torch.randn(_BATCH, 64, generator=self._generator)
        y = self._outputs(x)
        return x, y + _NOISE * torch.randn(y.shape, generator=self._generator)

    @torch.no_grad()
    def risk(self, model: nn.Module) -> float:
        """Mean squared error on 1,024 held-out inputs without noise, relative to that at the start."""
        return float((model(self._evaluation) - self._answers).square().sum(1).mean()) / self._start
