"""Initialisations of the adapter that keep the model's function: the oracle's and a random one (paper, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from scalora.config import Merge, ScaLoraConfig
from scalora.maths.oracle import optimal_adapter
from scalora.model.adapters import LoraPair, UnsupportedLayerError, find_lora_pairs
from scalora.model.matrices import matrices_of, stack_of_weight, stored_factors
from scalora.model.placement import check_places
from scalora.model.target_norms import target_norms
from scalora.parallel.data_parallel import unwrapped
from scalora.parallel.processes import averaged, require_process_group, take_from_first
from scalora.rescale.remainder import Remainder
from scalora.saving.attach import attach


def optimal_start(
    model: nn.Module,
    train_step: Callable[[], None],
    *,
    target_norm: float | None = None,
    smoothness: float | None = None,
    learning_rate: float | None = None,
    merge: Merge = ScaLoraConfig.merge,
    remainder_rank: int = ScaLoraConfig.remainder_rank,
) -> None:
    """Initialise every LoRA pair with the optimal factors for its gradient, and subtract their product from the base.

    The model's function does not change. This needs memory for the gradients of all adapted base weights at once.

    All processes of a data-parallel run get the first one's adapter and then the same start, from the mean of their
    gradients: call it in all of them.

    Args:
        model: a model with PEFT LoRA layers, before the first optimizer step; modified.
        train_step: computes the loss on a few batches and calls ``backward()`` (the convention of PEFT's
            ``preprocess_loraga``). Called once; the gradients of its backward passes add up.
        target_norm: ``1/√(Lη)``, the norm of every column of the factors. If this and `smoothness` are None, 1.
        smoothness: the paper's L > 0: the norm of the columns is then ``1/√(L·η·s²)``, as in `scalora.ScaLoraConfig`.
        learning_rate: η, the base (unscheduled) learning rate of the training that follows. Needed with `smoothness`.
        merge: where the product is subtracted: ``"dense"`` from the base weights, ``"factored"`` in a remainder beside
            them, ``"auto"`` as in `scalora.ScaLoraConfig`. The engine that is attached later needs the same setting.
        remainder_rank: the most columns that a compression of a factored remainder keeps.

    Raises:
        UnsupportedLayerError: a module is not supported, or its base weight is quantised or tied and so has no gradient
            of its own.
        ValueError: a layer got no gradient or a non-finite one, or is too small for 2·rank singular directions; or a
            setting is out of range, or the learning rate is missing. No layer has been changed then.
        RuntimeError: there are several processes, but `torch.distributed` has not been initialised.
    """
    require_process_group("optimal_start")
    config = ScaLoraConfig(target_norm=target_norm, smoothness=smoothness, merge=merge, remainder_rank=remainder_rank)
    model = unwrapped(model)
    pairs = find_lora_pairs(model, all_shapes=True)
    check_places(pairs, merge, remainder_rank)
    norms = _norms(pairs, config, learning_rate)
    # The gradients are those of one model, and the product that is merged into the base is one of these factors.
    take_from_first([p.data for pair in pairs for p in (pair.lora_A, pair.lora_B)])
    starts = []
    for pair, G in zip(pairs, weight_gradients(model, pairs, train_step), strict=True):
        if G is None:
            raise ValueError(
                f"module {pair.name!r} got no gradient: train_step must compute a loss that depends on it, and call "
                "backward()"
            )
        try:
            starts.append(optimal_adapter(G, pair.r, target_norm=norms[pair.name][0]))
        except ValueError as error:
            raise ValueError(f"module {pair.name!r}: {error}") from None
    _start_from(model, starts, config)


def random_start(
    model: nn.Module,
    *,
    target_norm: float | None = None,
    smoothness: float | None = None,
    learning_rate: float | None = None,
    merge: Merge = ScaLoraConfig.merge,
    remainder_rank: int = ScaLoraConfig.remainder_rank,
) -> None:
    """Initialise every LoRA pair with random columns of one norm, and subtract their product from the base.

    The model's function does not change. This is the control for `optimal_start`: as far from zero, but without knowing
    the gradient. All processes of a data-parallel run get the first one's: call it in all of them.

    Args:
        model: a model with PEFT LoRA layers, before the first optimizer step; modified.
        target_norm: the norm of every column of the factors. If this and `smoothness` are None, 1.
        smoothness: the paper's L > 0: the norm of the columns is then ``1/√(L·η·s²)``, as in `scalora.ScaLoraConfig`.
        learning_rate: η, the base (unscheduled) learning rate of the training that follows. Needed with `smoothness`.
        merge: where the product is subtracted: ``"dense"`` from the base weights, ``"factored"`` in a remainder beside
            them, ``"auto"`` as in `scalora.ScaLoraConfig`. The engine that is attached later needs the same setting.
        remainder_rank: the most columns that a compression of a factored remainder keeps.

    Raises:
        UnsupportedLayerError: a module is not supported.
        ValueError: a setting is out of range, or the learning rate is missing.
        RuntimeError: there are several processes, but `torch.distributed` has not been initialised.
    """
    require_process_group("random_start")
    config = ScaLoraConfig(target_norm=target_norm, smoothness=smoothness, merge=merge, remainder_rank=remainder_rank)
    model = unwrapped(model)
    pairs = find_lora_pairs(model, all_shapes=True)
    norms = _norms(pairs, config, learning_rate)
    take_from_first([p.data for pair in pairs for p in (pair.lora_A, pair.lora_B)])
    starts = []
    for pair in pairs:
        Bt, A = matrices_of(torch.randn_like(pair.lora_A), torch.randn_like(pair.lora_B), pair.experts)
        A = norms[pair.name][0] * nn.functional.normalize(A, dim=-2)
        starts.append((A, norms[pair.name][1] * nn.functional.normalize(Bt, dim=-1).mT))
    _start_from(model, starts, config)


def _norms(pairs: list[LoraPair], config: ScaLoraConfig, learning_rate: float | None) -> dict[str, tuple[float, float]]:
    if config.smoothness is not None and learning_rate is None:
        raise ValueError(
            f"smoothness={config.smoothness} sets the start's norm together with the learning rate of the training "
            "that follows: give learning_rate, too, or target_norm instead"
        )
    rate = learning_rate or 0.0
    return target_norms(pairs, {pair.name: (rate, rate) for pair in pairs}, config)


def _start_from(model: nn.Module, starts: list[tuple[Tensor, Tensor]], config: ScaLoraConfig) -> None:
    """Attach remainders and replace the factors, by the same numbers in all processes."""
    pairs, _ = attach(model, config.merge, config.remainder_rank)
    starts = [(A.contiguous(), B.contiguous()) for A, B in starts]
    take_from_first([factor for start in starts for factor in start])
    replace_factors(pairs, starts)


def require_weight_gradients(pairs: list[LoraPair]) -> None:
    """Check that all base weights can have gradients.

    Args:
        pairs: the LoRA pairs to check.

    Raises:
        UnsupportedLayerError: a base weight is quantised or tied.
    """
    for pair in pairs:
        if pair.quantised:
            raise UnsupportedLayerError(
                f"module {pair.name!r} has a quantised base weight, which has no gradient to initialise the adapter "
                "from: use PEFT's own initialisation"
            )
        if pair.tied:
            raise UnsupportedLayerError(
                f"module {pair.name!r} has a tied base weight ({' = '.join(pair.tied)}), whose gradient is that of all "
                "its layers together: use PEFT's own initialisation, or leave the module out of target_modules"
            )


def weight_gradients(model: nn.Module, pairs: list[LoraPair], train_step: Callable[[], None]) -> list[Tensor | None]:
    """The gradients ``∂ℓ/∂W`` of base weights. Afterwards they are frozen as before, and the model has no gradients.

    In a data-parallel run, the mean over all processes, which all have to call it.

    Args:
        model: the model.
        pairs: LoRA pairs of the model, whose base weights' gradients are computed.
        train_step: computes the loss on a few batches and calls ``backward()``; called once.

    Returns:
        The gradient of each pair's base weight, (m, n), or (E, m, n) of experts; None for a weight that got none.

    Raises:
        UnsupportedLayerError: a base weight is quantised or tied.
    """
    require_weight_gradients(pairs)
    trained_before = [pair.weight.requires_grad for pair in pairs]
    try:
        for pair in pairs:
            pair.weight.requires_grad_(True)
        train_step()
        gradients = averaged([pair.weight.grad for pair in pairs], [pair.weight for pair in pairs])
        return [None if G is None else _as_matrix(pair, G) for pair, G in zip(pairs, gradients, strict=True)]
    finally:
        for pair, trained in zip(pairs, trained_before, strict=True):
            pair.weight.requires_grad_(trained)
        model.zero_grad(set_to_none=True)


def _as_matrix(pair: LoraPair, gradient: Tensor) -> Tensor:
    stack = stack_of_weight(gradient, pair.experts)
    return pair.oriented(stack[0] if pair.experts == 1 else stack)


@torch.no_grad()
def replace_factors(pairs: list[LoraPair], starts: list[tuple[Tensor, Tensor]]) -> None:
    """Replace the factors of LoRA pairs, and subtract the change of their product from the remainder.

    Args:
        pairs: LoRA pairs with remainders; modified.
        starts: the new factors A, (m, r), and B, (n, r), of each pair; for experts, (E, m, r) and (E, n, r).
    """
    for pair, (A, B) in zip(pairs, starts, strict=True):
        _add_product(pair, pair.merge_scaling)
        lora_A, lora_B = stored_factors(B.mT, A, (pair.lora_A, pair.lora_B))
        pair.lora_B.copy_(lora_B)
        pair.lora_A.copy_(lora_A)
        _add_product(pair, -pair.merge_scaling)
    pairs[0].layer.factor_guard.forget()


def _add_product(pair: LoraPair, scaling: float) -> None:
    """Add ``scaling·A·Bᵀ`` to a pair's remainder, or to those of its experts."""
    if pair.is_matrix:
        pair.remainder.add(pair.weight, scaling * pair.lora_B, pair.lora_A.mT)
        return
    weights = pair.matrices_of_weight(pair.weight.detach())
    parts: Sequence[Remainder] = pair.remainder.by_matrix(pair.weight, weights)
    factors = pair.matrices_of_B(pair.lora_B), pair.matrices_of_A(pair.lora_A)
    for remainder, weight, A, Bt in zip(parts, weights, *factors, strict=True):
        remainder.add(weight, scaling * A, Bt.mT)
    pair.remainder.follow(parts)  # type: ignore[arg-type]  # of its own kind
