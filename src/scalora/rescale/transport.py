"""Transports gradients and optimizer state through a column scaling, exactly (paper, section 4).

After ``Ã = A·diag(α)``, ``B̃ = B·diag(β)`` the gradients are ``∂ℓ/∂Ã = (∂ℓ/∂A)·diag(β)`` and
``∂ℓ/∂B̃ = (∂ℓ/∂B)·diag(α)``: A's gradient is multiplied by β and B's by α. A statistic that is elementwise in the
gradient and homogeneous of degree k is multiplied by the k-th power of that factor; it is then what it would be if the
adapter had been scaled from the start. `scalora.rescale.optimizers` has the degrees of each optimizer's state.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from scalora.rescale.kernels import Multiply, multiply
from scalora.rescale.optimizers import USE_INSTEAD, UnsupportedOptimizerError
from scalora.rescale.quantised_state import COMPANIONS, scale_block_quantised


@torch.no_grad()
def scale_gradients_and_states(
    optimizer: Optimizer,
    degrees: Mapping[str, int],
    parameters: Sequence[Tensor],
    factors: Sequence[Tensor],
    multiply: Multiply = multiply,
) -> None:
    """Multiply the gradients and the state of parameters in place by powers of their factors.

    Exact for floating-point state. 8-bit state is quantised again where the factor varies within a block
    (`scalora.rescale.quantised_state`). Each entry of the state takes one operation for all parameters together, except
    for 8-bit state.

    Args:
        optimizer: the optimizer that holds the state.
        degrees: degree in the gradient of each entry of its state, from `state_degrees`.
        parameters: adapter matrices.
        factors: the factors of each parameter, of its shape, positive; 1 for columns that are left alone.
        multiply: multiplies lists of tensors in place, from the `Kernels` in use. Default: PyTorch's.

    Raises:
        UnsupportedOptimizerError: the state has an entry of the parameter's shape that `degrees` does not name, or an
            integer entry that is not in the block-wise format of bitsandbytes. Nothing has been changed then.
    """
    check_states(optimizer, degrees, parameters)
    gradients = [(p.grad, factor) for p, factor in zip(parameters, factors, strict=True) if p.grad is not None]
    entries: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    codes: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for parameter, factor in zip(parameters, factors, strict=True):
        state = optimizer.state.get(parameter, {})
        for key, value in _entries(state, parameter):
            if degrees[key] == 0:
                continue
            if value.is_floating_point():
                # Also moves the factor to the state's device: paged state is on the CPU.
                entries[key].append((value, factor.to(value)))
            else:
                absmax, qmap = (state[name] for name in COMPANIONS[key])
                codes.append((value, absmax, qmap, factor.to(qmap) ** degrees[key]))
    if gradients:
        multiply(*zip(*gradients, strict=True))
    for key, pairs in entries.items():
        multiply(*zip(*pairs, strict=True), degrees[key])
    for code in codes:
        scale_block_quantised(*code)


def check_states(optimizer: Optimizer, degrees: Mapping[str, int], parameters: Sequence[Tensor]) -> bool:
    """Check that the state that parameters have by now can be transported.

    Args:
        optimizer: the optimizer that holds the state.
        degrees: degree in the gradient of each entry of its state, from `state_degrees`.
        parameters: adapter matrices.

    Returns:
        Whether there is any state yet.

    Raises:
        UnsupportedOptimizerError: the state has an entry of the parameter's shape that `degrees` does not name, or an
            integer entry that is not in the block-wise format of bitsandbytes.
    """
    found = False
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        found = found or bool(state)
        for key, value in _entries(state, parameter):
            if key not in degrees:
                raise UnsupportedOptimizerError(
                    f"{type(optimizer).__name__} has a state {key!r} of the parameter's shape that is not registered "
                    f"(registered: {sorted(degrees)}): add it with scalora.register_optimizer"
                )
            known = key in COMPANIONS and all(name in state for name in COMPANIONS[key])
            if degrees[key] and not value.is_floating_point() and not known:
                raise UnsupportedOptimizerError(
                    f"{type(optimizer).__name__} keeps its state {key!r} as {value.dtype}, but without the block "
                    f"maxima and the code book of bitsandbytes' format; {USE_INSTEAD}"
                )
    return found


def _entries(state: Mapping[str, Any], parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The entries of a parameter's state that belong to its entries one by one."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            yield key, value
