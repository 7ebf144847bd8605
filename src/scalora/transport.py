"""Carries gradients and optimizer state through a column scaling, exactly: tensors and optimizers only.

After ``Ã = A·diag(α)``, ``B̃ = B·diag(β)`` the gradients are ``∂ℓ/∂Ã = (∂ℓ/∂A)·diag(β)`` and
``∂ℓ/∂B̃ = (∂ℓ/∂B)·diag(α)``: A's gradient takes β and B's takes α. A statistic that is elementwise in the gradient
and homogeneous of degree k takes the k-th power of that factor, and is then what it would have been had the adapter
been scaled from the start.
So an optimizer is described by one small table, state key → degree; it is refused when its state is not of that kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Refusal = Callable[[Mapping[str, Any]], str | None]
"""Looks at one parameter group and says in a clause why its settings can't be carried, or returns None."""

_DEGREES: dict[str, Mapping[str, int]] = {}
_REFUSALS: dict[str, Refusal] = {}

_USE_INSTEAD = "use torch.optim.AdamW instead, or plain LoRA with this optimizer"

# Known optimizers that mix rows or columns: said by name so that the user learns why and not only that.
_NOT_ELEMENTWISE = {
    "Adafactor": "its second moment is factored over rows and columns",
    "SM3": "its second moment is factored over rows and columns",
    "CAME": "its second moment is factored over rows and columns",
    "Muon": "it orthogonalises the whole momentum matrix, which mixes columns",
    "Shampoo": "its preconditioner mixes columns",
    "DistributedShampoo": "its preconditioner mixes columns",
    "SOAP": "its preconditioner mixes columns",
    "LBFGS": "its curvature pairs span all parameters",
    "GaLoreAdamW": "its moments live in a projected space of their own",
    "Adamax": "its state adds eps to the gradient before the maximum, so it does not scale",
    "Adadelta": "its state adds eps inside both averages, so it does not scale",
    "ASGD": "its state averages the parameters themselves",
    "SparseAdam": "it takes only sparse gradients, which LoRA does not have",
    "LoraFAOptimizer": "it freezes lora_A, so only one of the two factors has a gradient",
}


class UnsupportedOptimizerError(ValueError):
    """The optimizer's state can't be carried through a rescale exactly; the message says why and what to use."""


def register_optimizer(
    optimizer: type[Optimizer] | str, degrees: Mapping[str, int], *, refuse: Refusal | None = None
) -> None:
    """Teach scalora an optimizer whose state is elementwise in the gradient.

    Args:
        optimizer: the class, or its qualified name ``"module.Class"`` if it should not be imported. Subclasses are not
            covered: a subclass may do anything in its step.
        degrees: for each entry of the per-parameter state that has the parameter's shape, the power of the gradient
            that it scales with: 1 for a first moment, 2 for a second, 0 for what does not change. Entries of other
            shapes (step counts) are never touched.
        refuse: optional, called with each parameter group at attach time; returns why its settings can't be carried
            (a coupled weight decay, say) or None.

    Raises:
        ValueError: a degree is not a non-negative integer.

    Example:
        >>> register_optimizer("my_package.Signum", {"momentum": 1})
    """
    for key, degree in degrees.items():
        if not isinstance(degree, int) or degree < 0:
            raise ValueError(f"degree of state {key!r} must be a non-negative integer, got {degree!r}")
    name = optimizer if isinstance(optimizer, str) else _qualified_name(optimizer)
    _DEGREES[name] = dict(degrees)
    _REFUSALS[name] = refuse or (lambda group: None)


def state_degrees(optimizer: Optimizer) -> Mapping[str, int]:
    """The table of an optimizer's state.

    Raises:
        UnsupportedOptimizerError: its state, or the settings of one of its groups, can't be carried exactly.
    """
    name, short = _qualified_name(type(optimizer)), type(optimizer).__name__
    if name not in _DEGREES:
        reason = _NOT_ELEMENTWISE.get(
            short,
            "it is not registered; if its state is elementwise in the gradient, call scalora.register_optimizer",
        )
        raise UnsupportedOptimizerError(
            f"optimizer {short} ({name}) can't be carried through a ScaLoRA rescale: {reason}; {_USE_INSTEAD}"
        )
    for index, group in enumerate(optimizer.param_groups):
        if refusal := _REFUSALS[name](group):
            raise UnsupportedOptimizerError(f"optimizer {short}, parameter group {index}: {refusal}; {_USE_INSTEAD}")
    return _DEGREES[name]


@torch.no_grad()
def scale_gradient_and_state(
    optimizer: Optimizer, degrees: Mapping[str, int], parameter: Tensor, factor: Tensor
) -> None:
    """Multiply one parameter's gradient and state in place by powers of a factor.

    Args:
        optimizer: that holds the state.
        degrees: from `state_degrees`.
        parameter: an adapter matrix.
        factor: broadcastable against it, positive: 1 on the columns that are left alone.

    Raises:
        UnsupportedOptimizerError: the state has an entry of the parameter's shape that the table does not name.
    """
    if parameter.grad is not None:
        parameter.grad.mul_(factor)
    for key, value in optimizer.state.get(parameter, {}).items():
        if not isinstance(value, Tensor) or value.shape != parameter.shape:
            continue
        if key not in degrees:
            raise UnsupportedOptimizerError(
                f"{type(optimizer).__name__} keeps a state {key!r} of the parameter's shape that its entry does not "
                f"name (it names {sorted(degrees)}): register it with scalora.register_optimizer"
            )
        if degrees[key]:
            value.mul_(factor.to(value.dtype) ** degrees[key])


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _coupled_decay(group: Mapping[str, Any]) -> str | None:
    if group.get("weight_decay", 0) and not group.get("decoupled_weight_decay", False):
        return (
            f"weight_decay={group['weight_decay']} is added to the gradient, so the state is not a function of the "
            "gradient alone; set weight_decay=0 or use a decoupled decay (AdamW)"
        )
    return None


def _adagrad_settings(group: Mapping[str, Any]) -> str | None:
    if group.get("initial_accumulator_value", 0):
        return "initial_accumulator_value is not a gradient and does not scale; set it to 0"
    return _coupled_decay(group)


_ADAM = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}

register_optimizer(torch.optim.Adam, _ADAM, refuse=_coupled_decay)
register_optimizer(torch.optim.AdamW, _ADAM)
register_optimizer(torch.optim.NAdam, _ADAM, refuse=_coupled_decay)
register_optimizer(torch.optim.RAdam, _ADAM, refuse=_coupled_decay)
register_optimizer(torch.optim.SGD, {"momentum_buffer": 1}, refuse=_coupled_decay)
# RMSprop's momentum sums gradients already divided by their root mean square: degree 0 (exact up to eps).
register_optimizer(torch.optim.RMSprop, {"square_avg": 2, "grad_avg": 1, "momentum_buffer": 0}, refuse=_coupled_decay)
register_optimizer(torch.optim.Adagrad, {"sum": 2}, refuse=_adagrad_settings)
register_optimizer("lion_pytorch.lion_pytorch.Lion", {"exp_avg": 1})
