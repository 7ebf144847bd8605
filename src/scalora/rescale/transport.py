"""Transports gradients and optimizer state through a change of the factors, exactly (paper, section 4).

After ``Ã = A·P``, ``B̃ = B·Q`` the gradients are ``∂ℓ/∂Ã = (∂ℓ/∂A)·Q`` and ``∂ℓ/∂B̃ = (∂ℓ/∂B)·P``: A's gradient is
multiplied by Q from the right and B's by P. The paper's column scaling has ``P = diag(α)`` and ``Q = diag(β)``. A
statistic that is linear in the gradients is multiplied like them; one that is elementwise and homogeneous of degree k,
by the k-th power of the columns' factors, which only column scaling has; and a sum of ``gᵀg`` becomes ``Qᵀ(…)Q``. It is
then what it would be if the factors had been changed from the start. `scalora.rescale.optimizers` has the kinds of each
optimizer's state.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from scalora.rescale.kernels import Multiply, multiply
from scalora.rescale.optimizers import (
    LINEAR,
    MATRIX,
    USE_INSTEAD,
    Kind,
    UnsupportedOptimizerError,
    elementwise_refusal,
)
from scalora.rescale.quantised_state import COMPANIONS, scale_block_quantised


@runtime_checkable
class HoldsState(Protocol):
    """What the transport needs of an optimizer."""

    @property
    def state(self) -> Mapping[Any, Any]:
        """The state of each parameter."""


def gradients_of(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of parameters that have one.

    Args:
        parameters: the parameters.
    """
    return [gradient for parameter in parameters if (gradient := parameter.grad) is not None]


@torch.no_grad()
def scale_gradients_and_states(
    optimizer: HoldsState,
    kinds: Mapping[str, Kind],
    parameters: Sequence[Tensor],
    factors: Sequence[Tensor],
    multiply: Multiply = multiply,
) -> None:
    """Multiply the gradients and the state of parameters in place by powers of their factors.

    Exact for floating-point state. 8-bit state is quantised again where the factor varies within a block
    (`scalora.rescale.quantised_state`). The gradients and all of the state of one degree take one operation, except for
    8-bit state.

    Args:
        optimizer: the optimizer that holds the state.
        kinds: how each entry of its state depends on the gradients, from `state_kinds`.
        parameters: adapter matrices.
        factors: the factors of each parameter, of its shape, positive; 1 for columns that are left alone.
        multiply: multiplies lists of tensors in place, from the `Kernels` in use. Default: PyTorch's.

    Raises:
        UnsupportedOptimizerError: the state has an entry of the parameter's shape that `kinds` does not name, or an
            integer entry that is not in the block-wise format of bitsandbytes. Nothing has been changed then.
    """
    # By what is multiplied in one operation: the power of the factors, and where the tensors are. Paged state is on the
    # CPU, and state may be of another dtype than the gradients.
    entries: dict[tuple[int, torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    codes: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for parameter, factor in zip(parameters, factors, strict=True):
        if (gradient := parameter.grad) is not None:
            entries[1, gradient.device, gradient.dtype].append((gradient, factor))
        state = optimizer.state.get(parameter, {})
        for key, value in _checked_entries(optimizer, kinds, parameter, state, matrix=False):
            if (degree := _degree(kinds[key])) == 0:
                continue
            if value.is_floating_point():
                entries[degree, value.device, value.dtype].append((value, factor))
            else:
                absmax, qmap = (state[name] for name in COMPANIONS[key])
                codes.append((value, absmax, qmap, factor.to(qmap) ** degree))
    for (degree, device, dtype), products in entries.items():
        tensors = [tensor for tensor, _ in products]
        of_tensors = [f if f.dtype == dtype and f.device == device else f.to(device, dtype) for _, f in products]
        multiply(tensors, of_tensors, degree)
    for code in codes:
        scale_block_quantised(*code)


@torch.no_grad()
def transform_gradients_and_states(
    optimizer: HoldsState,
    kinds: Mapping[str, Kind],
    parameters: Sequence[Tensor],
    matrices: Float[Tensor, "layers r r"],
    changed: Bool[Tensor, " layers"],
    *,
    tall: bool,
) -> None:
    """Multiply the gradients and the state of parameters in place by r × r matrices.

    The gradients and all linear entries of the state take one operation for all parameters together, and so does each
    entry that is r × r.

    Args:
        optimizer: the optimizer that holds the state.
        kinds: how each entry of its state depends on the gradients, from `state_kinds`.
        parameters: adapter matrices of one shape.
        matrices: what the gradient of each, with r columns, is multiplied by from the right: Q for A, P for B.
        changed: whether that of each is another than 1.
        tall: whether the parameters have r columns, as ``lora_B``, and not r rows, as ``lora_A``.

    Raises:
        UnsupportedOptimizerError: the state has an entry that can't be carried over. Nothing has been changed then.
    """
    # By what is multiplied in one operation: tensors of one kind, and where they are, with the numbers of their layers.
    entries: dict[tuple[str, torch.device, torch.dtype], list[tuple[Tensor, int]]] = defaultdict(list)
    of_kind_matrix = [key for key, kind in kinds.items() if kind == MATRIX]
    for index, parameter in enumerate(parameters):
        if (gradient := parameter.grad) is not None:
            entries[LINEAR, gradient.device, gradient.dtype].append((gradient, index))
        state = optimizer.state.get(parameter, {})
        for key, value in _checked_entries(optimizer, kinds, parameter, state, matrix=True):
            if kinds[key] == LINEAR:
                entries[LINEAR, value.device, value.dtype].append((value, index))
        for key in of_kind_matrix:
            if (value := state.get(key)) is not None:
                entries[key, value.device, value.dtype].append((value, index))
    for (kind, device, dtype), of_layers in entries.items():
        tensors = [tensor for tensor, _ in of_layers]
        theirs, are_changed = _repeated([index for _, index in of_layers], matrices, changed)
        theirs, are_changed = theirs.to(device, dtype), are_changed.to(device)
        if kind == LINEAR:
            multiply_by_matrices(tensors, theirs, are_changed, tall=tall)
        else:
            transformed = theirs.mT @ torch.stack(tensors) @ theirs
            torch._foreach_copy_(tensors, list(transformed.unbind()))


def multiply_by_matrices(
    tensors: Sequence[Tensor],
    matrices: Float[Tensor, "layers r r"],
    changed: Bool[Tensor, " layers"],
    *,
    tall: bool,
) -> Float[Tensor, "layers rows columns"]:
    """Multiply factors, or what has their shape, by r × r matrices, in place.

    Args:
        tensors: matrices of one shape.
        matrices: what each, with r columns, is multiplied by from the right. The products are computed in their dtype.
        changed: whether each is to be changed. One that is not stays as it is, even if it has NaN or infinite entries.
        tall: whether the tensors have r columns, as ``lora_B``, and not r rows, as ``lora_A``.

    Returns:
        The tensors as they are then, stacked.
    """
    stack = torch.stack(list(tensors))
    wide = stack.to(matrices.dtype)
    product = (wide @ matrices if tall else matrices.mT @ wide).to(stack.dtype)
    multiplied = torch.where(changed[:, None, None], product, stack)
    torch._foreach_copy_(list(tensors), list(multiplied.unbind()))
    return multiplied


def _repeated(layers: list[int], matrices: Tensor, changed: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices of layers that are given by their numbers, in order, and whether they are changed."""
    each = len(layers) // len(matrices)
    if layers != [layer for layer in range(len(matrices)) for _ in range(each)]:
        return matrices[layers], changed[layers]
    # Without sending the numbers to the device.
    return (matrices, changed) if each == 1 else (matrices.repeat_interleave(each, 0), changed.repeat_interleave(each))


def _degree(kind: Kind) -> int:
    """The power of a column's factor that a state is multiplied by."""
    if kind == MATRIX:
        raise UnsupportedOptimizerError("a state of kind 'matrix' is carried over by transform_gradients_and_states")
    return 1 if kind == LINEAR else int(kind)


def check_states(
    optimizer: HoldsState, kinds: Mapping[str, Kind], parameters: Sequence[Tensor], *, matrix: bool = False
) -> bool:
    """Check that the state that parameters have by now can be transported.

    Args:
        optimizer: the optimizer that holds the state.
        kinds: how each entry of its state depends on the gradients, from `state_kinds`.
        parameters: adapter matrices.
        matrix: whether the state is to be carried through a matrix scaling.

    Returns:
        Whether there is any state yet.

    Raises:
        UnsupportedOptimizerError: the state has an entry of the parameter's shape that `kinds` does not name, an
            integer entry that is not in the block-wise format of bitsandbytes, or one that a matrix scaling can't carry
            over.
    """
    found = False
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        found = found or bool(state)
        _checked_entries(optimizer, kinds, parameter, state, matrix=matrix)
    return found


def _check_entry(
    optimizer: HoldsState, kinds: Mapping[str, Kind], state: Mapping[str, Any], key: str, value: Tensor, *, matrix: bool
) -> None:
    """Check that an entry of a parameter's state can be transported."""
    if key not in kinds:
        raise UnsupportedOptimizerError(
            f"{type(optimizer).__name__} has a state {key!r} of the parameter's shape that is not registered "
            f"(registered: {sorted(kinds)}): add it with scalora.register_optimizer"
        )
    if matrix and kinds[key] not in (LINEAR, MATRIX, 0):
        raise UnsupportedOptimizerError(elementwise_refusal(type(optimizer).__name__, key))
    if not kinds[key] or value.is_floating_point():
        return
    if matrix:
        raise UnsupportedOptimizerError(
            f"mode='matrix' can't be used with {type(optimizer).__name__}: it keeps its state {key!r} as "
            f"{value.dtype} in blocks; use scalora.PairAdamW, or a 32-bit optimizer"
        )
    if key not in COMPANIONS or any(name not in state for name in COMPANIONS[key]):
        raise UnsupportedOptimizerError(
            f"{type(optimizer).__name__} keeps its state {key!r} as {value.dtype}, but without the block "
            f"maxima and the code book of bitsandbytes' format; {USE_INSTEAD}"
        )


def _checked_entries(
    optimizer: HoldsState, kinds: Mapping[str, Kind], parameter: Tensor, state: Mapping[str, Any], *, matrix: bool
) -> list[tuple[str, Tensor]]:
    """The entries of a parameter's state that belong to its entries one by one, which can be transported."""
    shape = parameter.shape
    found = [(key, value) for key, value in state.items() if isinstance(value, Tensor) and value.shape == shape]
    for key, value in found:
        if matrix or key not in kinds or not value.is_floating_point():
            _check_entry(optimizer, kinds, state, key, value, matrix=matrix)
    return found
