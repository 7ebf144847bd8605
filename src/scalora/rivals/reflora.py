"""RefLoRA and RefLoRA-S: LoRA whose factors are refactored at every step, with their product unchanged.

Zhang, Li and Giannakis, "RefLoRA: Refactored Low-Rank Adaptation for Efficient Fine-Tuning of Large Models", NeurIPS
2025, arXiv:2505.18877. In the paper's notation, the weight of a layer is ``W + A·Bᵀ`` with ``A (m × r)``, PEFT's
``lora_B.weight``, and ``B (n × r)``, PEFT's ``lora_A.weight`` transposed. ``Ã = A·P`` and ``B̃ = B·P⁻ᵀ`` have the same
product for every invertible P, but a gradient step on them moves W by ``−η(G·B·S⁻¹·Bᵀ + A·S·Aᵀ·G)`` with ``S = P·Pᵀ``.
For an L-smooth loss, an upper bound on the loss after the step grows with

    (‖A·S^½‖² + ‖B·S^−½‖² − 1/(Lη))²       (Frobenius norms)

Over positive definite S it is minimal (Theorem 3) at the geometric mean of ``(AᵀA)⁻¹`` and ``BᵀB``, the only S with
``S·AᵀA·S = BᵀB``, for which ``ÃᵀÃ = B̃ᵀB̃``. This holds for learning rates that are not too small, with ``1/(Lη)`` at
most twice the nuclear norm of ``A·Bᵀ``. For smaller ones, many S reach a bound of 0, and the method uses the same S:
it depends neither on L nor on η.

RefLoRA takes the step on the refactored pair and then returns to (A, B). This is equivalent to multiplying the
gradients by ``S⁻¹`` and S, and leaves the optimizer's moments unchanged. RefLoRA-S restricts S to multiples of the
identity, ``s = ‖B‖/‖A‖``, and keeps the refactored pair; gradients and moments are converted to it exactly.

The theorem needs factors of full rank, which PEFT's initialisation does not have (``lora_B = 0``). As in the authors'
scripts, the first steps are therefore those of plain LoRA. Two things differ from the authors' code
(zhangyilang/RefLoRA): a pair without full rank is skipped in that step, where their code adds an epsilon to the
singular values, and its scalar version would multiply ``lora_A`` by 0 at PEFT's initialisation; and there is no
interval between refactorings, which is 1 in their scripts.
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
from scalora.rescale.optimizers import evaluate_closure, state_kinds, unwrapped_optimizer
from scalora.rescale.transport import scale_gradients_and_states
from scalora.rivals.method import Method

# A squared pivot or a singular value smaller than this many rounding errors, relative to its matrix, has fewer than
# about three correct digits.
_ROUNDINGS = 1e3


class Refactoring(NamedTuple):
    """The refactoring ``Ã = A·P``, ``B̃ = B·P⁻ᵀ``, with ``S = P·Pᵀ`` and ``S⁻¹ = P⁻ᵀ·P⁻¹``.

    Attributes:
        P: P, (…, r, r), in the solver's dtype; the identity for layers that are not usable.
        P_inverse_transposed: P⁻ᵀ, (…, r, r), in the solver's dtype; the identity for layers that are not usable.
        usable: whether A and B are finite and of full rank, (…).
    """

    P: Float[Tensor, "*layers r r"]
    P_inverse_transposed: Float[Tensor, "*layers r r"]
    usable: Bool[Tensor, "*layers"]


def optimal_refactoring(A: Float[Tensor, "*layers m r"], B: Float[Tensor, "*layers n r"]) -> Refactoring:
    """The refactoring of Theorem 3. P is unique up to a rotation from the right, on which S does not depend.

    With the Cholesky factors ``AᵀA = K·Kᵀ`` and ``BᵀB = M·Mᵀ`` and the decomposition ``KᵀM = U·Σ·Vᵀ``, it is
    ``P = M·V·Σ^−½`` and ``P⁻ᵀ = K·U·Σ^−½``. No Gram matrix is inverted, and Σ holds the singular values of ``A·Bᵀ``.

    Args:
        A: (…, m, r), PEFT's ``lora_B.weight``.
        B: (…, n, r), PEFT's ``lora_A.weight`` transposed.

    Returns:
        The refactoring, in float64 (float32 on devices without it), never NaN.
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
    """The refactoring of RefLoRA-S: the best S among multiples of the identity, ``s = ‖B‖/‖A‖``, with ``P = √s``.

    Args:
        A: (…, m, r), PEFT's ``lora_B.weight``.
        B: (…, n, r), PEFT's ``lora_A.weight`` transposed.

    Returns:
        s, (…), positive, in float64 (float32 on devices without it); exactly 1 where A or B is zero or not finite.
    """
    dtype = solver_dtype(A.device)
    norm_A, norm_B = (torch.linalg.vector_norm(factor.to(dtype), dim=(-2, -1)) for factor in (A, B))
    s = norm_B / norm_A
    return torch.where(s.isfinite() & (s > 0), s, 1)


def _cholesky_of_gram(factor: Tensor) -> tuple[Tensor, Tensor]:
    """L of ``FᵀF = L·Lᵀ``, and whether the Gram matrix is regular; L is the identity where it is not."""
    gram = factor.mT @ factor
    L, info = torch.linalg.cholesky_ex(gram)
    roundings = _ROUNDINGS * torch.finfo(gram.dtype).eps
    pivots, diagonal = L.diagonal(dim1=-2, dim2=-1).square(), gram.diagonal(dim1=-2, dim2=-1)
    regular = (info == 0) & (pivots > roundings * diagonal).all(-1)
    return torch.where(regular[..., None, None], L, torch.eye(L.shape[-1]).to(L)), regular


class _Refactorer:
    """The common part of both refactorers: the pairs by shape, and the step count."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, warmup_steps: int = 0, steps_done: int = 0) -> None:
        self._optimizer = unwrapped_optimizer(optimizer)
        self._groups = by_shape(find_lora_pairs(model))
        self._warmup_steps = warmup_steps
        self._steps = steps_done
        self._hook: RemovableHandle

    def detach(self) -> None:
        """Remove the hooks: training continues as plain LoRA."""
        self._hook.remove()


class GradientRefactorer(_Refactorer):
    """Attaches RefLoRA to a PEFT model and its optimizer: ``∂ℓ/∂A ← ∂ℓ/∂A·S⁻¹``, ``∂ℓ/∂B ← ∂ℓ/∂B·S`` before each step.

    Example:
        >>> GradientRefactorer(model, optimizer, warmup_steps=100)  # then train as usual

    Args:
        model: a model with PEFT LoRA layers and exactly one active adapter.
        optimizer: the model's optimizer, of any kind, or a wrapper that holds it in ``.optimizer``, such as
            Accelerate's.
        warmup_steps: steps of plain LoRA before the first refactoring.
        steps_done: steps that a resumed run has already taken.

    Raises:
        UnsupportedLayerError: a layer that `scalora.model.adapters.find_lora_pairs` rejects.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, warmup_steps: int = 0, steps_done: int = 0) -> None:
        super().__init__(model, optimizer, warmup_steps=warmup_steps, steps_done=steps_done)
        self._hook = self._optimizer.register_step_pre_hook(self._before_step)

    @torch.no_grad()
    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        with_loss = evaluate_closure(args, kwargs)
        if self._steps >= self._warmup_steps:
            for pairs in self._groups:
                _precondition([pair for pair in pairs if pair.has_gradients])
        self._steps += 1
        return with_loss


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

    It acts after a step rather than before the next one, so that the gradients, and their norm for clipping, are those
    of the refactored pair. The optimizer's state becomes what it would be if the pair had been scaled from the start.

    Args:
        model: a model with PEFT LoRA layers and exactly one active adapter.
        optimizer: the model's optimizer, of a kind known to `scalora.register_optimizer`, or a wrapper that holds it in
            ``.optimizer``, such as Accelerate's.
        warmup_steps: steps of plain LoRA before the first refactoring. 0: refactor immediately, too.
        steps_done: steps that a resumed run has already taken.

    Raises:
        UnsupportedLayerError: a layer that `scalora.model.adapters.find_lora_pairs` rejects.
        UnsupportedOptimizerError: it is not known how the optimizer's state scales.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, warmup_steps: int = 0, steps_done: int = 0) -> None:
        super().__init__(model, optimizer, warmup_steps=warmup_steps, steps_done=steps_done)
        self._kinds = state_kinds(self._optimizer)
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
            scale_gradients_and_states(self._optimizer, self._kinds, lora_B, expand_factors(1 / root, lora_B))
            scale_gradients_and_states(self._optimizer, self._kinds, lora_A, expand_factors(root, lora_A))


class RefLoraCallback(TrainerCallback):  # type: ignore[misc]
    """Attaches RefLoRA or RefLoRA-S to a Trainer's model and optimizer. Checkpoints are those of plain LoRA.

    Args:
        refactorer: `GradientRefactorer` for RefLoRA, `ScalarRefactorer` for RefLoRA-S.
        warmup_steps: steps of plain LoRA before the first refactoring.
    """

    def __init__(self, refactorer: type[GradientRefactorer] | type[ScalarRefactorer], warmup_steps: int) -> None:
        self._refactorer = refactorer
        self._warmup_steps = warmup_steps
        self._attached: GradientRefactorer | ScalarRefactorer | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Return the adapter to float32: on a quantised base, TRL converts it to bfloat16."""
        promote_adapters(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the model and optimizer that the Trainer has created.

        Raises:
            UnsupportedLayerError: a layer that can't be refactored.
            UnsupportedOptimizerError: for RefLoRA-S, if it is not known how the optimizer's state scales.
        """
        self._attached = self._refactorer(
            kwargs["model"], kwargs["optimizer"], warmup_steps=self._warmup_steps, steps_done=state.global_step
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach. The next training attaches again."""
        if self._attached is not None:
            self._attached.detach()


@dataclass(frozen=True)
class RefLora(Method):
    """RefLoRA: the optimal refactoring at every step.

    Raises:
        ValueError: `warmup_steps` is negative.
    """

    steps_entries: ClassVar[bool] = False
    refactorer: ClassVar[type[GradientRefactorer] | type[ScalarRefactorer]] = GradientRefactorer
    """The class that attaches the method to a model and its optimizer."""

    warmup_steps: int = 100
    """Steps of plain LoRA before the first refactoring, in which ``lora_B`` grows to full rank. The default is that of
    the authors' scripts. Set fewer in runs of a few hundred steps, and 0 for an initialisation of full rank."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps!r} must be at least 0")

    def callbacks(self) -> list[TrainerCallback]:
        """The callback that attaches the method to the Trainer's model and optimizer."""
        return [RefLoraCallback(self.refactorer, self.warmup_steps)]


@dataclass(frozen=True)
class RefLoraS(RefLora):
    """RefLoRA-S: one refactoring factor for the whole adapter of a layer.

    Raises:
        ValueError: `warmup_steps` is negative.
    """

    refactorer: ClassVar[type[GradientRefactorer] | type[ScalarRefactorer]] = ScalarRefactorer
    """The class that attaches the method to a model and its optimizer."""
