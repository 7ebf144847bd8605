"""Carries gradients and optimizer state through a column scaling, exactly (paper, section 4).

After ``Ã = A·diag(α)``, ``B̃ = B·diag(β)`` the gradients are ``∂ℓ/∂Ã = (∂ℓ/∂A)·diag(β)`` and
``∂ℓ/∂B̃ = (∂ℓ/∂B)·diag(α)``: A's gradient takes β and B's takes α. A statistic that is elementwise in the gradient
and homogeneous of degree k takes the k-th power of that factor, and is then what it would have been had the adapter
been scaled from the start. `scalora.rescale.optimizers` says of which degree the entries of an optimizer's state are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

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
    """Multiply the gradients and the state of some parameters in place by powers of their factors.

    Exact for floating-point state; 8-bit codes are coded again where they have to be (see `quantised_state`). One
    operation for each entry of the state, whatever the number of parameters, save for 8-bit codes.

    Args:
        optimizer: that holds the state.
        degrees: from `state_degrees`.
        parameters: adapter matrices.
        factors: one of each parameter's shape, positive: 1 on the columns that are left alone.
        multiply: how: `scalora.rescale.native.multiply` where that is built.

    Raises:
        UnsupportedOptimizerError: the state has an entry of the parameter's shape that the table does not name, or one
            of integers that are not the block-wise codes of bitsandbytes; nothing has been changed then.
    """
    gradients = [(p.grad, factor) for p, factor in zip(parameters, factors, strict=True) if p.grad is not None]
    entries: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    codes: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for parameter, factor in zip(parameters, factors, strict=True):
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                continue
            if key not in degrees:
                raise UnsupportedOptimizerError(
                    f"{type(optimizer).__name__} keeps a state {key!r} of the parameter's shape that its entry does "
                    f"not name (it names {sorted(degrees)}): register it with scalora.register_optimizer"
                )
            if degrees[key] == 0:
                continue
            if value.is_floating_point():
                # To the entry's device too: a paged one counts as the host's.
                entries[key].append((value, factor.to(value)))
            elif key in COMPANIONS and all(name in state for name in COMPANIONS[key]):
                absmax, qmap = (state[name] for name in COMPANIONS[key])
                codes.append((value, absmax, qmap, factor.to(qmap) ** degrees[key]))
            else:
                raise UnsupportedOptimizerError(
                    f"{type(optimizer).__name__} keeps its state {key!r} as {value.dtype}, without the maxima and the "
                    f"code book that bitsandbytes keeps beside such codes; {USE_INSTEAD}"
                )
    if gradients:
        multiply(*zip(*gradients, strict=True))
    for key, pairs in entries.items():
        multiply(*zip(*pairs, strict=True), degrees[key])
    for code in codes:
        scale_block_quantised(*code)
