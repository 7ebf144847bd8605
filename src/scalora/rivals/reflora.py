"""`RefLora`, `RefLoraS`: the adapter refactored before each step, its product unchanged (arXiv:2505.18877).

Zhang, Li and Giannakis, "RefLoRA: Refactored Low-Rank Adaptation for Efficient Fine-Tuning of Large Models", NeurIPS
2025. Notation is the paper's: the layer's weight is ``W + A·Bᵀ`` with ``A (m × r)`` (PEFT's ``lora_B.weight``) and
``B (n × r)`` (PEFT's ``lora_A.weight`` transposed). ``Ã = A·P``, ``B̃ = B·P⁻ᵀ`` have the same product for every
invertible P, but a gradient step on them moves W by ``−η(G·B·S⁻¹·Bᵀ + A·S·Aᵀ·G)`` with ``S = P·Pᵀ``. For an L-smooth
loss a bound on the loss after it grows with

    (‖A·S^½‖² + ‖B·S^−½‖² − 1/(Lη))²       (Frobenius norms)

and its minimum over positive definite S (Theorem 3) is the geometric mean of ``(AᵀA)⁻¹`` and ``BᵀB``, the one S with
``S·AᵀA·S = BᵀB``, which makes ``ÃᵀÃ = B̃ᵀB̃``. It is the minimum for learning rates that are not too small, ``1/(Lη)`` at
most twice the nuclear norm of ``A·Bᵀ``; for smaller ones many S attain a bound of 0, and this one is taken all the
same: neither L nor η enters the method.

RefLoRA takes the step and goes back to (A, B), which comes to gradients multiplied by ``S⁻¹`` and S and leaves the
optimizer's moments where they are. RefLoRA-S restricts S to multiples of the identity, ``s = ‖B‖/‖A‖``, and refactors
for good: the moments are scaled with the gradients, exactly.

The theorem is for factors of full rank, which PEFT's start is not (``lora_B = 0``). As in the authors' scripts, the
first steps are therefore plain LoRA's. Two differences from their code (zhangyilang/RefLoRA): a pair without full rank
is left alone at that step (their code adds an epsilon to the singular values, and its scalar version would multiply
``lora_A`` by 0 at PEFT's start), and there is no interval between refactorings, which is 1 in their scripts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scalora.maths.scaling import solver_dtype
from scalora.model.adapters import LoraPair, by_shape, find_lora_pairs, promote_adapters
from scalora.rescale.kernels import expand_factors, multiply
from scalora.rescale.optimizers import refuse_closure, state_degrees, unwrapped_optimizer
from scalora.rescale.transport import scale_gradients_and_states
from scalora.rivals.method import Method

# A squared pivot or a singular value that is smaller, relative to what it is a part of, than this many roundings has
# fewer than about three digits left.
_ROUNDINGS = 1e3


class Refactoring(NamedTuple):
    """``Ã = A·P``, ``B̃ = B·P⁻ᵀ``; with them ``S = P·Pᵀ`` and ``S⁻¹ = P⁻ᵀ·P⁻¹``.

    Attributes:
        P: (…, r, r), in the solver's dtype; the identity where the layer is left alone.
        P_inverse_transposed: P⁻ᵀ, (…, r, r).
        usable: whether A and B are finite and of full rank, (…); the others are left alone.
    """

    P: Float[Tensor, "*layers r r"]
    P_inverse_transposed: Float[Tensor, "*layers r r"]
    usable: Bool[Tensor, "*layers"]


def optimal_refactoring(A: Float[Tensor, "*layers m r"], B: Float[Tensor, "*layers n r"]) -> Refactoring:
    """The refactoring of Theorem 3; P is determined up to a rotation from the right, which S does not see.

    With the Cholesky factors ``AᵀA = K·Kᵀ``, ``BᵀB = M·Mᵀ`` and ``KᵀM = U·Σ·Vᵀ``, it is ``P = M·V·Σ^−½`` and
    ``P⁻ᵀ = K·U·Σ^−½``: no inverse of a Gram matrix, and Σ are the singular values of ``A·Bᵀ``.

    Args:
        A: (…, m, r), PEFT's ``lora_B.weight``.
        B: (…, n, r), PEFT's ``lora_A.weight`` transposed.

    Returns:
        `Refactoring`, float64 (float32 on devices without it); never NaN.
    """
    dtype = solver_dtype(A.device)
    K, A_regular = _cholesky_of_gram(A.to(dtype))
    M, B_regular = _cholesky_of_gram(B.to(dtype))
    U, values, Vh = torch.linalg.svd(K.mT @ M)
    usable = A_regular & B_regular & (values[..., -1] > _ROUNDINGS * torch.finfo(dtype).eps * values[..., 0])
    columns = torch.where(usable[..., None], values, 1).rsqrt()[..., None, :]
    identity = torch.eye(K.shape[-1], dtype=dtype, device=K.device)
    chosen = usable[..., None, None]
    return Refactoring(
        torch.where(chosen, M @ Vh.mT * columns, identity), torch.where(chosen, K @ U * columns, identity), usable
    )


def optimal_scalar(A: Float[Tensor, "*layers m r"], B: Float[Tensor, "*layers n r"]) -> Float[Tensor, "*layers"]:
    """RefLoRA-S: the best S among multiples of the identity, ``s = ‖B‖/‖A‖``; ``P`` is then ``√s``.

    Args:
        A: (…, m, r), PEFT's ``lora_B.weight``.
        B: (…, n, r), PEFT's ``lora_A.weight`` transposed.

    Returns:
        s, (…), positive, float64 (float32 on devices without it); exactly 1 where A or B is zero or not finite.
    """
    dtype = solver_dtype(A.device)
    norm_A, norm_B = (torch.linalg.vector_norm(factor.to(dtype), dim=(-2, -1)) for factor in (A, B))
    s = norm_B / norm_A
    return torch.where(s.isfinite() & (s > 0), s, 1)


def _cholesky_of_gram(factor: Tensor) -> tuple[Tensor, Tensor]:
    """``FᵀF = L·Lᵀ``, and whether it is regular; L is the identity where it is not."""
    gram = factor.mT @ factor
    L, info = torch.linalg.cholesky_ex(gram)
    roundings = _ROUNDINGS * torch.finfo(gram.dtype).eps
    pivots, diagonal = L.diagonal(dim1=-2, dim2=-1).square(), gram.diagonal(dim1=-2, dim2=-1)
    regular = (info == 0) & (pivots > roundings * diagonal).all(-1)
    return torch.where(regular[..., None, None], L, torch.eye(L.shape[-1]).to(L)), regular


class _Refactorer:
    """What the two have in common: the pairs by shape, and the count of steps."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, warmup_steps: int = 0, steps_done: int = 0) -> None:
        self._optimizer = unwrapped_optimizer(optimizer)
        self._groups = by_shape(find_lora_pairs(model))
        self._warmup_steps = warmup_steps
        self._steps = steps_done
        self._hook: RemovableHandle

    def detach(self) -> None:
        """Stop refactoring: training goes on as plain LoRA."""
        self._hook.remove()


class GradientRefactorer(_Refactorer):
    """Attaches RefLoRA to a PEFT model and its optimizer: before each step ``∂ℓ/∂A ← ∂ℓ/∂A·S⁻¹``, ``∂ℓ/∂B ← ∂ℓ/∂B·S``.

    Example:
        >>> GradientRefactorer(model, optimizer, warmup_steps=100)  # and train as before

    Args:
        model: with PEFT LoRA layers, exactly one adapter active.
        optimizer: any; a wrapper with the real one in ``.optimizer`` (Accelerate's) is looked through.
        warmup_steps: plain LoRA steps before the first refactoring.
        steps_done: by a run that goes on.

    Raises:
        UnsupportedLayerError: a module that `find_lora_pairs` refuses.
        ValueError: in a step that is given a closure, which computes the gradients too late.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, warmup_steps: int = 0, steps_done: int = 0) -> None:
        super().__init__(model, optimizer, warmup_steps=warmup_steps, steps_done=steps_done)
        self._hook = self._optimizer.register_step_pre_hook(self._before_step)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_closure("RefLoRA", args, kwargs)
        if self._steps >= self._warmup_steps:
            for pairs in self._groups:
                _precondition([pair for pair in pairs if pair.has_gradients])
        self._steps += 1


def _precondition(pairs: list[LoraPair]) -> None:
    if not pairs:
        return
    A, B = torch.stack([pair.lora_B for pair in pairs]), torch.stack([pair.lora_A for pair in pairs]).mT
    P, Q, _ = optimal_refactoring(A, B)
    S, S_inverse = (P @ P.mT).to(A.dtype), (Q @ Q.mT).to(A.dtype)
    for i, pair in enumerate(pairs):
        assert pair.lora_A.grad is not None
        assert pair.lora_B.grad is not None
        pair.lora_B.grad.copy_(pair.lora_B.grad @ S_inverse[i])
        pair.lora_A.grad.copy_(S[i] @ pair.lora_A.grad)


class ScalarRefactorer(_Refactorer):
    """Attaches RefLoRA-S to a PEFT model and its optimizer: ``A ← √s·A``, ``B ← B/√s`` after each step.

    After a step and not before the next, so that the gradients, and their norm where they are clipped, are the
    refactored adapter's. The optimizer's state becomes what it would be had the adapter been scaled from the start.

    Args:
        model: with PEFT LoRA layers, exactly one adapter active.
        optimizer: whose state can be carried over (see `scalora.register_optimizer`); a wrapper with the real one in
            ``.optimizer`` (Accelerate's) is looked through.
        warmup_steps: plain LoRA steps before the first refactoring; with 0 it is done at once.
        steps_done: by a run that goes on.

    Raises:
        UnsupportedLayerError: a module that `find_lora_pairs` refuses.
        UnsupportedOptimizerError: an optimizer that can't be carried over, by name.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, warmup_steps: int = 0, steps_done: int = 0) -> None:
        super().__init__(model, optimizer, warmup_steps=warmup_steps, steps_done=steps_done)
        self._degrees = state_degrees(self._optimizer)
        self._hook = self._optimizer.register_step_post_hook(self._after_step)
        if self._warmup_steps == 0 and self._steps == 0:
            self._refactor()

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._steps += 1
        if self._steps >= self._warmup_steps:
            self._refactor()

    @torch.no_grad()
    def _refactor(self) -> None:
        for pairs in self._groups:
            lora_B: list[Tensor] = [pair.lora_B for pair in pairs]
            lora_A: list[Tensor] = [pair.lora_A for pair in pairs]
            root = optimal_scalar(torch.stack(lora_B), torch.stack(lora_A).mT).sqrt().to(lora_B[0].dtype)[:, None, None]
            multiply(lora_B, expand_factors(root, lora_B))
            multiply(lora_A, expand_factors(1 / root, lora_A))
            scale_gradients_and_states(self._optimizer, self._degrees, lora_B, expand_factors(1 / root, lora_B))
            scale_gradients_and_states(self._optimizer, self._degrees, lora_A, expand_factors(root, lora_A))


class RefLoraCallback(TrainerCallback):  # type: ignore[misc]
    """Trains with RefLoRA or RefLoRA-S in a Trainer; checkpoints and resuming are plain LoRA's.

    Raises:
        UnsupportedLayerError, UnsupportedOptimizerError: at the start of training, as the refactorer.
    """

    def __init__(self, refactorer: type[GradientRefactorer] | type[ScalarRefactorer], warmup_steps: int) -> None:
        self._refactorer = refactorer
        self._warmup_steps = warmup_steps
        self._attached: GradientRefactorer | ScalarRefactorer | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make the adapter float32 again where TRL has made it bfloat16 (on a quantised base)."""
        promote_adapters(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the model and optimizer that the Trainer has built."""
        self._attached = self._refactorer(
            kwargs["model"], kwargs["optimizer"], warmup_steps=self._warmup_steps, steps_done=state.global_step
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach: training again attaches anew."""
        if self._attached is not None:
            self._attached.detach()


@dataclass(frozen=True)
class RefLora(Method):
    """RefLoRA as a method.

    Attributes:
        warmup_steps: plain LoRA steps before the first refactoring, while ``lora_B`` grows to full rank. 100 in the
            authors' scripts; fewer where a run has only a few hundred steps. 0 suits a start of full rank.

    Raises:
        ValueError: `warmup_steps` is negative.
    """

    refactorer: ClassVar[type[GradientRefactorer] | type[ScalarRefactorer]] = GradientRefactorer

    warmup_steps: int = 100

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps!r} must be 0 or more steps")

    def callbacks(self) -> list[TrainerCallback]:
        """The refactorings."""
        return [RefLoraCallback(self.refactorer, self.warmup_steps)]


@dataclass(frozen=True)
class RefLoraS(RefLora):
    """RefLoRA-S as a method: one factor for a whole adapter. Attributes and errors as for `RefLora`."""

    refactorer: ClassVar[type[GradientRefactorer] | type[ScalarRefactorer]] = ScalarRefactorer
