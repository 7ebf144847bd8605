"""Which optimizers can be carried through a rescale, and how: a table of each, state key → degree in the gradient.

A new optimizer is one `register_optimizer` call at the end of this file; one that can't be carried, a line in
`_REFUSED_BY_NAME`, so that the user learns why and not only that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

Refusal = Callable[[Mapping[str, Any]], str | None]
"""Looks at one parameter group and says in a clause why its settings can't be carried, or returns None."""

_DEGREES: dict[str, Mapping[str, int]] = {}
_REFUSALS: dict[str, Refusal] = {}

USE_INSTEAD = "use torch.optim.AdamW instead, or plain LoRA with this optimizer"

_FACTORED = "its second moment is factored over rows and columns"
_PRECONDITIONED = "its preconditioner mixes columns"
_PROJECTED = "its moments live in a projected space of their own"
_PARAMETER_AVERAGE = (
    "it averages the parameters themselves, and the function at the averaged point would not survive the merge into "
    "the base; a learning rate schedule does what the averaging is for"
)
_IN_BACKWARD = "it updates the weights inside the backward pass, before there is a step to rescale at"
_TWO_MOMENTS_IN_ONE = "it stacks two first moments in one entry that does not have the parameter's shape"
_STEP_FROM_START = "its step size comes from the distance to the parameters' start, which a rescale moves"
_TENSOR_SUBCLASS = (
    "its state is a quantised tensor of its own kind; the optimizer of this name in bitsandbytes is carried"
)

# Known optimizers that can't be carried, by class or qualified name: so that the user learns why and not only that.
_REFUSED_BY_NAME = {
    "Adafactor": _FACTORED,
    "SM3": _FACTORED,
    "CAME": _FACTORED,
    "Muon": "it orthogonalises the whole momentum matrix, which mixes columns",
    "Shampoo": _PRECONDITIONED,
    "DistributedShampoo": _PRECONDITIONED,
    "SOAP": _PRECONDITIONED,
    "LBFGS": "its curvature pairs span all parameters",
    # GaLore and APOLLO export classes that are called plain AdamW inside.
    "galore_torch.adamw.AdamW": _PROJECTED,
    "galore_torch.adamw8bit.AdamW8bit": _PROJECTED,
    "apollo_torch.apollo.AdamW": _PROJECTED,
    "apollo_torch.q_apollo.AdamW": _PROJECTED,
    "Lomo": _IN_BACKWARD,
    "AdaLomo": _IN_BACKWARD,
    "LayerWiseDummyOptimizer": _IN_BACKWARD,
    "GrokAdamW": "it keeps its moments in the parameter group instead of the state, out of reach of a rescale",
    "AdEMAMix": _TWO_MOMENTS_IN_ONE,
    "AdEMAMix8bit": _TWO_MOMENTS_IN_ONE,
    "AdEMAMix32bit": _TWO_MOMENTS_IN_ONE,
    "PagedAdEMAMix": _TWO_MOMENTS_IN_ONE,
    "PagedAdEMAMix8bit": _TWO_MOMENTS_IN_ONE,
    "PagedAdEMAMix32bit": _TWO_MOMENTS_IN_ONE,
    "torchao.optim.adam.AdamW8bit": _TENSOR_SUBCLASS,
    "torchao.optim.adam.AdamW4bit": _TENSOR_SUBCLASS,
    "AdamWScheduleFree": _PARAMETER_AVERAGE,
    "RAdamScheduleFree": _PARAMETER_AVERAGE,
    "SGDScheduleFree": _PARAMETER_AVERAGE,
    "ASGD": _PARAMETER_AVERAGE,
    "Prodigy": _STEP_FROM_START,
    "Adamax": "its state adds eps to the gradient before the maximum, so it does not scale",
    "Adadelta": "its state adds eps inside both averages, so it does not scale",
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
        reason = (
            _REFUSED_BY_NAME.get(name)
            or _REFUSED_BY_NAME.get(short)
            or "it is not registered; if its state is elementwise in the gradient, call scalora.register_optimizer"
        )
        raise UnsupportedOptimizerError(
            f"optimizer {short} ({name}) can't be carried through a ScaLoRA rescale: {reason}; {USE_INSTEAD}"
        )
    for index, group in enumerate(optimizer.param_groups):
        if refusal := _REFUSALS[name](group):
            raise UnsupportedOptimizerError(f"optimizer {short}, parameter group {index}: {refusal}; {USE_INSTEAD}")
    return _DEGREES[name]


def unwrapped_optimizer(optimizer: Any) -> Optimizer:
    """The real optimizer, out of a wrapper that holds it in ``.optimizer`` (Accelerate's).

    Args:
        optimizer: the optimizer, or its wrapper.
    """
    inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def refuse_closure(method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check, in a step pre-hook, that the gradients are there already.

    Args:
        method: what an error calls the hook's owner.
        args: of the hook; torch hands it the optimizer itself as the first of them.
        kwargs: of the hook.

    Raises:
        ValueError: the step was given a closure.
    """
    if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
        raise ValueError(
            f"optimizer.step(closure) computes the gradients after {method} has to see them: call backward() first "
            "and optimizer.step() without a closure"
        )


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


def _bitsandbytes_lion_decay(group: Mapping[str, Any]) -> str | None:
    # Coupled in the 32-bit kernels of CUDA, Triton and MPS before 0.50 (bitsandbytes issue 1992), decoupled elsewhere.
    if group.get("weight_decay", 0):
        return (
            f"weight_decay={group['weight_decay']}: some versions of bitsandbytes add Lion's decay to the gradient, so "
            "the state is not a function of the gradient alone; set weight_decay=0 or use lion_pytorch.Lion"
        )
    return None


def _stable_adamw_settings(group: Mapping[str, Any]) -> str | None:
    if group.get("gradient_release"):
        return "gradient_release=True: " + _IN_BACKWARD
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in group["params"])
    if half and group.get("kahan_sum") is not False:
        return (
            "kahan_sum keeps rounding remainders of the parameters, which scale as they do and not as the gradient; "
            "set kahan_sum=False or train the adapters in float32"
        )
    return None


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
register_optimizer("optimi.stableadamw.StableAdamW", {"exp_avg": 1, "exp_avg_sq": 2}, refuse=_stable_adamw_settings)


def _register_bitsandbytes() -> None:
    """Its optimizers by name: each class keeps 32-bit state for small parameters whatever its bits."""
    families: list[tuple[str, str, bool, Mapping[str, int], Refusal | None]] = [
        # The decay of Adam is decoupled there, as AdamW's is: the two classes run the same kernel.
        ("adam", "Adam", True, {"state1": 1, "state2": 2}, None),
        ("adamw", "AdamW", True, {"state1": 1, "state2": 2}, None),
        ("lion", "Lion", True, {"state1": 1}, _bitsandbytes_lion_decay),
        ("sgd", "SGD", False, {"state1": 1}, _coupled_decay),
        ("rmsprop", "RMSprop", False, {"state1": 2}, _coupled_decay),
        ("adagrad", "Adagrad", False, {"state1": 2}, _coupled_decay),
    ]
    for module, name, paged, degrees, refuse in families:
        for prefix in ("", "Paged") if paged else ("",):
            for bits in ("", "8bit", "32bit"):
                register_optimizer(f"bitsandbytes.optim.{module}.{prefix}{name}{bits}", degrees, refuse=refuse)


_register_bitsandbytes()
