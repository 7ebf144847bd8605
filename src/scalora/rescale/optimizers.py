"""Which optimizers' states can be transported through a rescale, and how (paper, section 4).

For each optimizer a table maps the keys of its state to their `Kind`. To add an optimizer, call `register_optimizer` at
the end of this file. To refuse one, add a line to `_REFUSED_BY_NAME`, so that the error says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import torch
from torch.optim import Optimizer

from scalora.maths.mode import Mode

LINEAR: Final = "linear"
"""Kind of a state that is linear in the gradients, such as a moving average of them."""

MATRIX: Final = "matrix"
"""Kind of an r × r state that is a sum of ``gᵀg`` over the gradients g of a factor with r columns."""

Kind = int | Literal["linear", "matrix"]
"""How an entry of an optimizer's state depends on the gradients: a number k if it is elementwise of degree k in them (2
for Adam's second moment, 0 for what does not change), `LINEAR`, or `MATRIX`. A column scaling carries any kind over, a
matrix scaling `LINEAR` and `MATRIX` ones, and those of degree 0."""

Refusal = Callable[[Mapping[str, Any]], str | None]
"""Called with a parameter group; returns why the state can't be transported with its settings, or None if it can."""

_KINDS: dict[str, Mapping[str, Kind]] = {}
_REFUSALS: dict[str, Refusal] = {}

USE_INSTEAD = "use torch.optim.AdamW instead, or plain LoRA with this optimizer"

_FACTORED = "its second moment is factored over rows and columns"
_PRECONDITIONED = "its preconditioner mixes columns"
_PROJECTED = "its moments are kept in a projected space"
_PARAMETER_AVERAGE = (
    "it averages the parameters themselves, and a merge into the base would change the function at the average; a "
    "learning rate schedule serves the same purpose"
)
_IN_BACKWARD = "it updates the weights during the backward pass, before a rescale could take place"
_TWO_MOMENTS_IN_ONE = "it stacks two first moments in one entry that does not have the parameter's shape"
_STEP_FROM_START = "its step size depends on the distance from the starting point, which a rescale changes"
_TENSOR_SUBCLASS = (
    "its state is a tensor subclass with its own quantisation; bitsandbytes' optimizer of the same name is supported"
)

# Known optimizers whose state can't be transported, by class name or qualified name, with the reason.
_REFUSED_BY_NAME = {
    "Adafactor": _FACTORED,
    "SM3": _FACTORED,
    "CAME": _FACTORED,
    "Shampoo": _PRECONDITIONED,
    "DistributedShampoo": _PRECONDITIONED,
    "SOAP": _PRECONDITIONED,
    "LBFGS": "its curvature pairs span all parameters",
    # The classes that GaLore and APOLLO export are internally called AdamW.
    "galore_torch.adamw.AdamW": _PROJECTED,
    "galore_torch.adamw8bit.AdamW8bit": _PROJECTED,
    "apollo_torch.apollo.AdamW": _PROJECTED,
    "apollo_torch.q_apollo.AdamW": _PROJECTED,
    "Lomo": _IN_BACKWARD,
    "AdaLomo": _IN_BACKWARD,
    "LayerWiseDummyOptimizer": _IN_BACKWARD,
    "GrokAdamW": "it keeps its moments in the parameter group instead of the state",
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
    "Adamax": "it adds eps to the gradient before taking the maximum, so its state does not scale with the gradient",
    "Adadelta": "it adds eps to both averages, so its state does not scale with the gradient",
    "SparseAdam": "it takes only sparse gradients, and LoRA's are dense",
    "Lookahead": _PARAMETER_AVERAGE,
    "SWA": _PARAMETER_AVERAGE,
    "LoraFAOptimizer": "it freezes lora_A, and ScaLoRA needs the gradients of both factors",
}


class UnsupportedOptimizerError(ValueError):
    """The optimizer's state can't be transported exactly through a rescale. The message says why and what to use."""


def register_optimizer(
    optimizer: type[Optimizer] | str, kinds: Mapping[str, Kind], *, refuse: Refusal | None = None
) -> None:
    """Register an optimizer whose state a rescale can carry over.

    Args:
        optimizer: the class, or its qualified name ``"module.Class"`` to avoid importing it. Subclasses need a
            registration of their own, because a subclass may change what a step does.
        kinds: for each entry of the per-parameter state that has the parameter's shape, how it depends on the gradient:
            ``"linear"`` for a moving average or a sum of gradients, such as a first moment; a number for what is
            elementwise of that degree: 2 for a second moment, 1 for an average of magnitudes, 0 for what does not
            change. ``"matrix"`` is for r × r entries, sums of ``gᵀg``. Entries of other shapes, such as step counts,
            are never changed.
        refuse: called with each parameter group when ScaLoRA is attached; returns why its settings rule out an exact
            transport (a coupled weight decay, for example), or None. By default no settings are refused.

    Raises:
        ValueError: a kind is none of these.

    Examples:
        >>> register_optimizer("my_package.Signum", {"momentum": "linear"})
    """
    for key, kind in kinds.items():
        degree = isinstance(kind, int) and not isinstance(kind, bool) and kind >= 0
        if not degree and kind not in (LINEAR, MATRIX):
            raise ValueError(
                f"the kind of state {key!r} must be 'linear', 'matrix', or its degree in the gradient, a non-negative "
                f"integer; got {kind!r}"
            )
    name = optimizer if isinstance(optimizer, str) else _qualified_name(optimizer)
    _KINDS[name] = dict(kinds)
    _REFUSALS[name] = refuse or (lambda group: None)


def state_kinds(optimizer: Optimizer, mode: Mode = "auto") -> Mapping[str, Kind]:
    """How each entry of an optimizer's state depends on the gradients.

    Args:
        optimizer: the optimizer itself, not a wrapper.
        mode: the kind of scaling that the state is to be carried through.

    Raises:
        UnsupportedOptimizerError: its state can't be transported exactly, in general, with the settings of one of its
            parameter groups, or through a scaling of this kind.
    """
    kind, short = type(optimizer), type(optimizer).__name__
    name = _qualified_name(kind)
    if name not in _KINDS:
        raise UnsupportedOptimizerError(
            f"the state of optimizer {short} ({name}) can't be transported through a ScaLoRA rescale: "
            f"{_reason_to_refuse(kind) or _not_registered(kind)}; {USE_INSTEAD}"
        )
    for index, group in enumerate(optimizer.param_groups):
        if refusal := _REFUSALS[name](group):
            raise UnsupportedOptimizerError(f"optimizer {short}, parameter group {index}: {refusal}; {USE_INSTEAD}")
    kinds = _KINDS[name]
    elementwise = [key for key, of_state in kinds.items() if of_state not in (LINEAR, MATRIX, 0)]
    # Muon with an auxiliary Adam has both; which one an adapter gets is seen in its state.
    if mode == "matrix" and elementwise and not any("use_muon" in group for group in optimizer.param_groups):
        raise UnsupportedOptimizerError(elementwise_refusal(short, elementwise[0]))
    return kinds


def elementwise_refusal(optimizer: str, key: str) -> str:
    """Why a matrix scaling can't carry a state over.

    Args:
        optimizer: name of the optimizer's class.
        key: the entry of its state that is elementwise in the gradients.
    """
    return (
        f"mode='matrix' can't be used with {optimizer}: its state {key!r} is elementwise in the gradients, which an "
        "r × r change of the factors mixes; use scalora.PairAdamW, or one of the other modes"
    )


def _reason_to_refuse(kind: type) -> str | None:
    """Why an optimizer of a class, or of one that it inherits from, is known to be unsupported; None if it is not."""
    names = (name for cls in kind.__mro__ for name in (_qualified_name(cls), cls.__name__))
    return next((_REFUSED_BY_NAME[name] for name in names if name in _REFUSED_BY_NAME), None)


def _not_registered(kind: type) -> str:
    known = next((name for name in map(_qualified_name, kind.__mro__) if name in _KINDS), None)
    if known is None:
        return "it is not registered; if its state is elementwise in the gradient, call scalora.register_optimizer"
    return (
        f"it may do something else in a step than {known}, which it inherits from; if it doesn't, call "
        f"scalora.register_optimizer({kind.__name__}, {dict(_KINDS[known])})"
    )


def unwrapped_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer inside wrappers that hold it in ``.optimizer``, such as Accelerate's; else the optimizer itself.

    Args:
        optimizer: an optimizer, or a wrapper.

    Raises:
        UnsupportedOptimizerError: a wrapper is known to do more than to pass steps on.
    """
    inner = optimizer
    while (wrapped := getattr(inner, "optimizer", None)) is not None:
        if (reason := _reason_to_refuse(type(inner))) is not None:
            raise UnsupportedOptimizerError(
                f"optimizer {type(inner).__name__} around {type(wrapped).__name__} can't be used with ScaLoRA: {reason}"
            )
        inner = wrapped
    found: Optimizer = inner
    return found


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """Evaluate the closure of an optimizer's step.

    Args:
        closure: recomputes the loss and the gradients; may be None.

    Returns:
        The loss; None without a closure.
    """
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def evaluate_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """In a step pre-hook, evaluate the closure of ``optimizer.step(closure)``, so that the gradients are there.

    Args:
        args: positional arguments that the hook got; torch passes the optimizer as the first one.
        kwargs: keyword arguments that the hook got.

    Returns:
        What the hook has to return: the arguments with a closure that only gives the loss; None without a closure.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        return None
    evaluated = _EvaluatedClosure(loss_of(closure))
    if "closure" in kwargs:
        return args, {**kwargs, "closure": evaluated}
    return (args[0], evaluated, *args[2:]), kwargs


class _EvaluatedClosure:
    """Gives the loss of a closure that has been evaluated, once."""

    def __init__(self, loss: Any) -> None:
        self._loss = loss
        self._asked = False

    def __call__(self) -> Any:
        if self._asked:
            raise UnsupportedOptimizerError(
                "the optimizer evaluates the closure of a step more than once, but a rescale belongs to the gradients "
                f"of one evaluation; {USE_INSTEAD}"
            )
        self._asked = True
        return self._loss


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _coupled_decay(group: Mapping[str, Any]) -> str | None:
    if group.get("weight_decay", 0) and not group.get("decoupled_weight_decay", False):
        return (
            f"weight_decay={group['weight_decay']} is added to the gradient, so the state is not a function of the "
            "gradient alone; set weight_decay=0 or use a decoupled weight decay (AdamW)"
        )
    return None


def _adagrad_settings(group: Mapping[str, Any]) -> str | None:
    if group.get("initial_accumulator_value", 0):
        value = group["initial_accumulator_value"]
        return f"initial_accumulator_value={value} does not scale with the gradient; set it to 0"
    return _coupled_decay(group)


def _bitsandbytes_lion_decay(group: Mapping[str, Any]) -> str | None:
    # Coupled in the 32-bit kernels for CUDA, Triton and MPS before 0.50 (bitsandbytes issue 1992), decoupled elsewhere.
    if group.get("weight_decay", 0):
        return (
            f"weight_decay={group['weight_decay']} is added to the gradient by some versions of bitsandbytes' Lion, so "
            "the state is not a function of the gradient alone; set weight_decay=0 or use lion_pytorch.Lion"
        )
    return None


def _stable_adamw_settings(group: Mapping[str, Any]) -> str | None:
    if group.get("gradient_release"):
        return "gradient_release=True: " + _IN_BACKWARD
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in group["params"])
    if half and group.get("kahan_sum") is not False:
        return (
            "kahan_sum keeps the rounding errors of the parameters, which scale with the parameters and not with the "
            "gradient; set kahan_sum=False or train the adapters in float32"
        )
    return None


_ADAM: Mapping[str, Kind] = {"exp_avg": LINEAR, "exp_avg_sq": 2, "max_exp_avg_sq": 2}

register_optimizer(torch.optim.Adam, _ADAM, refuse=_coupled_decay)
register_optimizer(torch.optim.AdamW, _ADAM)
register_optimizer(torch.optim.NAdam, _ADAM, refuse=_coupled_decay)
register_optimizer(torch.optim.RAdam, _ADAM, refuse=_coupled_decay)
register_optimizer(torch.optim.SGD, {"momentum_buffer": LINEAR}, refuse=_coupled_decay)
register_optimizer(torch.optim.Muon, {"momentum_buffer": LINEAR})
# RMSprop's momentum sums gradients that are already divided by their root mean square: degree 0 (exact up to eps).
register_optimizer(
    torch.optim.RMSprop, {"square_avg": 2, "grad_avg": LINEAR, "momentum_buffer": 0}, refuse=_coupled_decay
)
register_optimizer(torch.optim.Adagrad, {"sum": 2}, refuse=_adagrad_settings)
register_optimizer(
    "scalora.pair_adamw.PairAdamW",
    {"exp_avg": LINEAR, "second_moment": MATRIX, "exp_avg_sq": 0},  # AdamW's is of parameters outside of pairs
)
register_optimizer("lion_pytorch.lion_pytorch.Lion", {"exp_avg": LINEAR})
# DeepSpeed's Adam says in an attribute whether its decay is coupled: `scalora.parallel.zero` looks at it.
register_optimizer("deepspeed.ops.adam.cpu_adam.DeepSpeedCPUAdam", _ADAM)
register_optimizer("deepspeed.ops.adam.fused_adam.FusedAdam", _ADAM)
register_optimizer(
    "optimi.stableadamw.StableAdamW", {"exp_avg": LINEAR, "exp_avg_sq": 2}, refuse=_stable_adamw_settings
)


def _register_muon() -> None:
    """Register Keller Jordan's Muon by name: its momentum for Muon's parameters, Adam's moments for the others."""
    for name in ("Muon", "SingleDeviceMuon"):
        register_optimizer(f"muon.{name}", {"momentum_buffer": LINEAR})
    for name in ("MuonWithAuxAdam", "SingleDeviceMuonWithAuxAdam"):
        register_optimizer(f"muon.{name}", {"momentum_buffer": LINEAR, "exp_avg": LINEAR, "exp_avg_sq": 2})


def _register_bitsandbytes() -> None:
    """Register the optimizers of bitsandbytes by name.

    The tables hold for 32-bit and 8-bit state: 8-bit classes keep the state of small parameters in 32 bits.
    """
    families: list[tuple[str, str, bool, Mapping[str, Kind], Refusal | None]] = [
        # Adam's weight decay is decoupled here, like AdamW's: the two classes run the same kernel.
        ("adam", "Adam", True, {"state1": LINEAR, "state2": 2}, None),
        ("adamw", "AdamW", True, {"state1": LINEAR, "state2": 2}, None),
        ("lion", "Lion", True, {"state1": LINEAR}, _bitsandbytes_lion_decay),
        ("sgd", "SGD", False, {"state1": LINEAR}, _coupled_decay),
        ("rmsprop", "RMSprop", False, {"state1": 2}, _coupled_decay),
        ("adagrad", "Adagrad", False, {"state1": 2}, _coupled_decay),
    ]
    for module, name, paged, degrees, refuse in families:
        for prefix in ("", "Paged") if paged else ("",):
            for bits in ("", "8bit", "32bit"):
                register_optimizer(f"bitsandbytes.optim.{module}.{prefix}{name}{bits}", degrees, refuse=refuse)


_register_muon()
_register_bitsandbytes()
