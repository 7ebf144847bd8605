"""`ScaLora`: one rescale per optimizer step, in the paper's order, as a step pre-hook (paper, Algorithm 1).

gradients are final → solve for v → α, β → merge ``W += s·A·diag(1 − αβ)·Bᵀ`` → scale A, B, their gradients and their
optimizer state → the optimizer steps on Ã, B̃.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from scalora import native
from scalora.adapters import LoraPair, by_rank, by_shape, keep_out_of_broadcasts
from scalora.changed_base import attach, state_of
from scalora.config import ScaLoraConfig
from scalora.kernels import PYTORCH, Kernels
from scalora.remainder import FactoredRemainder
from scalora.scaling import COLUMN, SCALAR, Grams, Scaling, scaling_of_grams, solver_dtype
from scalora.state import (
    STATE_FILE,
    StateError,
    check_base,
    check_content,
    check_fit,
    check_random_state,
    random_state,
    read_state,
    restore,
    saved_config,
    set_random_state,
    write_state,
)
from scalora.transport import refuse_closure, scale_gradients_and_states, state_degrees

PARTS = ("scalora::solve", "scalora::merge", "scalora::transport")
"""The parts of a rescale, as a profiler's trace names them."""

_QUANTILES = (0.1, 0.5, 0.9)

# The share of a factored remainder that may be discarded before it is said: what an exported adapter may leave out too.
_MUCH = 1e-3

_LEFT_ALONE_BECAUSE = {
    "nonfinite": "its adapter or its gradient had NaN or infinite entries; look at the loss, the data and the learning "
    "rate",
    "exploding": "its optimal factors were beyond a million or below a millionth; look at target_norm or smoothness",
}


class _Constants(NamedTuple):
    """What the mathematics takes besides tensors of the model, for the layers of one rank."""

    scalings: list[float]
    target_norms: Tensor
    scaling: Tensor


class ScaLora:
    """Attaches ScaLoRA to a PEFT model and its optimizer.

    Example:
        >>> model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> ScaLora(model, optimizer, ScaLoraConfig())  # and train as before

    Args:
        model: with PEFT LoRA layers, exactly one adapter active. With `DistributedDataParallel`, the model before it is
            wrapped, or the wrapper.
        optimizer: any whose state can be carried over (see `scalora.register_optimizer`); a wrapper with the real one
            in ``.optimizer`` (Accelerate's) is looked through.
        config: settings; the defaults when None.

    Raises:
        UnsupportedLayerError: a module that can't be treated, by name.
        UnsupportedOptimizerError: an optimizer that can't be carried over, by name.
        ValueError: an adapter parameter that the optimizer does not hold, or `smoothness` with a zero learning rate.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, config: ScaLoraConfig | None = None) -> None:
        self.config = config or ScaLoraConfig()
        if isinstance(model, DistributedDataParallel):
            keep_out_of_broadcasts(model)
            model = model.module
        self._model = model
        self._optimizer = getattr(optimizer, "optimizer", optimizer)
        self._degrees = state_degrees(self._optimizer)
        self._pairs, self._progress = attach(model, self.config.merge, self.config.remainder_rank)
        rates = _base_learning_rates(self._optimizer)
        self._target_norms = {pair.name: _target_norms(pair, rates, self.config) for pair in self._pairs}
        self._groups = [by_shape(pairs) for pairs in by_rank(self._pairs)]
        self._kernels = self._chosen_kernels()
        self._progress.config = self.config
        self._progress.restart(step=0, rescales=0)
        self._constants: dict[tuple[str, ...], _Constants] = {}
        self._last: list[tuple[Scaling, Tensor]] | None = None
        self._left_alone = {"nonfinite": torch.zeros(()), "exploding": torch.zeros(())}
        self._said: set[str] = set()
        self._hook = self._optimizer.register_step_pre_hook(self._before_step)

    def detach(self) -> None:
        """Stop rescaling. The model goes on as plain LoRA on its base and remainder as they are now."""
        self._hook.remove()
        self._say_what_was_bad()

    def metrics(self) -> dict[str, float]:
        """What the last rescale did, and counts since attaching; empty before the first rescale.

        Keys: ``scalora/column_share``, ``scalora/scalar_share``, ``scalora/left_alone_share`` and
        ``scalora/degenerate_share`` (of all layers; degenerate ones are among those left alone), quantiles of the
        factors over all columns ``scalora/alpha_p10 … beta_p90``, ``scalora/merge_norm`` (Frobenius norm of all that
        was merged at this rescale); counts so far: ``scalora/rescales``, and of layers left alone at a rescale
        ``scalora/nonfinite`` (NaN or infinity in the adapter or its gradient) and ``scalora/exploding`` (factors beyond
        a million or below a millionth). With a factored remainder ``scalora/remainder_columns`` (the most of any layer)
        and ``scalora/discarded`` (what compressions have left out, as a share of the remainder's Frobenius norm).
        """
        self._say_what_was_bad()
        if self._last is None:
            return {}
        counts = {f"scalora/{kind}": count.item() for kind, count in self._left_alone.items()}
        counts["scalora/rescales"] = float(self._progress.rescales)
        last = _summary(self._last, len(self._pairs))
        return {key: value.item() for key, value in last.items()} | counts | self._remainder_metrics()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to go on exactly as if it had not stopped, as tensors, numbers and texts.

        The base weights where they were merged into, or the factored remainders; the trained parameters; the
        optimizer's state; the counters and settings; the states of the random number generators. Tensors are not
        copied: `copy.deepcopy` a state that should outlive the next step. A learning-rate scheduler and the position in
        the data are the training loop's own.
        """
        self._say_what_was_bad()
        return state_of(self._model, self._pairs) | {
            "optimizer": self._optimizer.state_dict(),
            "random": random_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` left off. A state without an optimizer (`save_pretrained`'s) restores the rest.

        Raises:
            StateError: the state is of another base model, adapter or settings, lacks an entry, or has numbers that are
                not finite; the model is then as it was.
        """
        check_content(state)
        check_base(state, self._progress.fingerprint)
        saved = saved_config(state)
        if saved is not None and saved != self.config:
            raise StateError(f"the state was saved with {saved}, this engine has {self.config}: use the same settings")
        check_fit(self._model, self._pairs, state["tensors"])
        if "random" in state:
            check_random_state(state["random"])
        if "optimizer" in state:
            try:
                self._optimizer.load_state_dict(state["optimizer"])  # torch checks all of it before it changes anything
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise StateError(
                    f"the state's optimizer does not fit {type(self._optimizer).__name__}: {error}"
                ) from None
        restore(self._model, self._pairs, state["tensors"])
        if "random" in state:
            set_random_state(state["random"])
        self._progress.restart(step=state["step"], rescales=state["rescales"])

    def save(self, folder: str | Path) -> None:
        """Write `state_dict` to ``scalora_state.safetensors`` in a folder, atomically: an older one stays until then.

        Raises:
            OSError: it can't be written.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_state(Path(folder) / STATE_FILE, self.state_dict())

    def load(self, folder: str | Path) -> None:
        """Restore what `save`, or `save_pretrained` of an attached model, wrote.

        Raises:
            StateError: as `load_state_dict`; or the file is missing, damaged, or of another format version.
        """
        self.load_state_dict(read_state(Path(folder)))

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_closure("ScaLoRA", args, kwargs)
        self._progress.step += 1
        if not self._rescales_at(self._progress.step):
            return
        # GradScaler calls a fused optimizer even when it will skip the step; whether it will, only the device knows.
        skipped = getattr(optimizer, "found_inf", None)
        rescaled = [self._rescale_group(shapes, skipped) for shapes in map(_with_gradients, self._groups) if shapes]
        self._last = [part for part in rescaled if part is not None]
        self._progress.count_rescale(skipped)
        for scaling, _ in self._last:
            for kind, count in self._left_alone.items():
                self._left_alone[kind] = count.to(scaling.alpha.device) + getattr(scaling, kind).sum()

    def _rescales_at(self, step: int) -> bool:
        since_warmup = step - self.config.warmup_steps
        return since_warmup >= 1 and since_warmup % self.config.interval == 0

    def _rescale_group(self, shapes: list[list[LoraPair]], skipped: Tensor | None) -> tuple[Scaling, Tensor] | None:
        """Solve, merge and carry over for layers of one rank; returns the scaling and the merges' squared norms.

        Each operation is one for all of the layers of a shape, and of all shapes in the solution, save the merge, which
        is one for each weight.
        """
        sizes = [len(pairs) for pairs in shapes]
        with record_function(PARTS[0]):
            constants = self._constants_of([pair for pairs in shapes for pair in pairs])
            parts = [self._kernels.grams(*_factors_and_gradients(pairs)) for pairs in shapes]
            grams = Grams(*map(torch.cat, zip(*parts, strict=True)))
            scaling = self._scaling(grams, constants.target_norms)
            if skipped is not None:
                scaling = scaling.unless(skipped.to(scaling.alpha.device) > 0)
            dtype, exact = shapes[0][0].lora_A.dtype, scaling.alpha.dtype
            alpha, beta = scaling.alpha.to(dtype), scaling.beta.to(dtype)
            # 1 − αβ of the factors as they are applied, in the solver's precision: the function is kept to rounding.
            coefficients = constants.scaling * (1 - alpha.to(exact) * beta.to(exact))
        of_shapes = (torch.split(factors, sizes) for factors in (alpha, beta, coefficients))
        for pairs, *of_shape in zip(shapes, *of_shapes, strict=True):
            self._apply(pairs, *of_shape)
        return scaling, _energy(grams, coefficients)

    def _apply(self, pairs: list[LoraPair], alpha: Tensor, beta: Tensor, coefficients: Tensor) -> None:
        """Merge what a scaling of layers of one shape leaves, and scale their factors and all that goes along."""
        lora_A: list[Tensor] = [p.lora_A for p in pairs]
        lora_B: list[Tensor] = [p.lora_B for p in pairs]
        with record_function(PARTS[1]):
            self._kernels.merge([p.remainder for p in pairs], [p.weight for p in pairs], lora_B, lora_A, coefficients)
        with record_function(PARTS[2]):
            spread = self._kernels.spread
            self._kernels.multiply(lora_B, spread(alpha[:, None, :], lora_B))
            self._kernels.multiply(lora_A, spread(beta[:, :, None], lora_A))
            self._carry_over(lora_B, spread(beta[:, None, :], lora_B))
            self._carry_over(lora_A, spread(alpha[:, :, None], lora_A))

    def _chosen_kernels(self) -> Kernels:
        on_cpu = any(pair.lora_A.is_cpu for pair in self._pairs)
        return native.build() if self.config.native and on_cpu else PYTORCH

    def _constants_of(self, pairs: list[LoraPair]) -> _Constants:
        """Target norms and scalings on the device, sent there again only when the layers or PEFT's scaling change."""
        names, scalings = tuple(pair.name for pair in pairs), [pair.scaling for pair in pairs]
        # Under the names alone, so that a scaling on a schedule does not leave one set behind at every step.
        known = self._constants.get(names)
        if known is None or known.scalings != scalings:
            device = pairs[0].lora_A.device
            dtype = solver_dtype(device)
            norms = torch.tensor([self._target_norms[name] for name in names], dtype=dtype)
            scaling = torch.tensor(scalings, dtype=dtype)[:, None]
            known = self._constants[names] = _Constants(scalings, norms.to(device), scaling.to(device))
        return known

    # The two decisions of a rescale, each a method so that a comparison can replace it (`scalora.rivals.controls`).

    def _scaling(self, grams: Grams, target_norms: Tensor) -> Scaling:
        """α and β of layers: the analytic optimum."""
        return scaling_of_grams(grams, target_norm=target_norms, mode=self.config.mode)

    def _carry_over(self, parameters: list[Tensor], factors: list[Tensor]) -> None:
        """Take the gradients and the optimizer's state of parameters along: exactly."""
        scale_gradients_and_states(self._optimizer, self._degrees, parameters, factors, self._kernels.multiply)

    def _say_what_was_bad(self) -> None:
        """Warn once of each kind. Here and not in the step, which must not wait for the device."""
        for kind, why in _LEFT_ALONE_BECAUSE.items():
            if kind not in self._said and (count := int(self._left_alone[kind].item())):
                self._said.add(kind)
                warnings.warn(f"ScaLoRA left a layer alone at {count} rescales: {why}", stacklevel=3)

    def _remainder_metrics(self) -> dict[str, float]:
        remainders = [p.remainder for p in self._pairs if isinstance(p.remainder, FactoredRemainder)]
        if not remainders:
            return {}
        lost = sum(remainder.discarded.item() for remainder in remainders)
        kept = sum(remainder.energy().item() for remainder in remainders)
        discarded = math.sqrt(lost / kept) if kept else 0.0
        if discarded > _MUCH and "discarded" not in self._said:
            self._said.add("discarded")
            warnings.warn(
                f"remainder_rank={self.config.remainder_rank} is too small for this run: {discarded:.1e} of the "
                "factored remainder has been discarded; raise it, or set merge='dense'",
                stacklevel=3,
            )
        return {
            "scalora/remainder_columns": float(max(remainder.left.shape[1] for remainder in remainders)),
            "scalora/discarded": discarded,
        }


def _with_gradients(shapes: list[list[LoraPair]]) -> list[list[LoraPair]]:
    return list(filter(None, ([pair for pair in pairs if pair.has_gradients] for pairs in shapes)))


def _factors_and_gradients(pairs: list[LoraPair]) -> Iterator[list[Tensor]]:
    """lora_B, its gradients, lora_A, its gradients."""
    for parameters in ([pair.lora_B for pair in pairs], [pair.lora_A for pair in pairs]):
        yield list(parameters)
        yield [p.grad for p in parameters if p.grad is not None]


def _energy(grams: Grams, coefficients: Tensor) -> Tensor:
    """``‖A·diag(coefficients)·Bᵀ‖²`` of each layer."""
    AtA, BtB = grams.of_factors
    products = coefficients[:, :, None] * coefficients[:, None, :]
    # A layer that is left alone because it is not finite has moved nothing.
    return torch.where(products == 0, 0, products * AtA * BtB).sum((-2, -1))


def _summary(parts: list[tuple[Scaling, Tensor]], total: int) -> dict[str, Tensor]:
    """Metrics of one rescale. Not made in the step, which must not wait for the device."""
    if not parts:
        return {"scalora/left_alone_share": torch.tensor(1.0)}
    device = parts[0][1].device
    choice = torch.cat([scaling.choice.to(device) for scaling, _ in parts])
    degenerate = torch.cat([scaling.degenerate.to(device) for scaling, _ in parts])
    column, scalar = (choice == COLUMN).sum(), (choice == SCALAR).sum()
    summary = {
        "scalora/column_share": column / total,
        "scalora/scalar_share": scalar / total,
        "scalora/left_alone_share": (total - column - scalar) / total,
        "scalora/degenerate_share": degenerate.sum() / total,
        "scalora/merge_norm": torch.cat([energy.to(device) for _, energy in parts]).sum().sqrt(),
    }
    for name in ("alpha", "beta"):
        factors = torch.cat([getattr(scaling, name).to(device).flatten() for scaling, _ in parts]).float()
        for q in _QUANTILES:
            summary[f"scalora/{name}_p{round(100 * q)}"] = factors.quantile(q)
    return summary


def _base_learning_rates(optimizer: Optimizer) -> dict[int, float]:
    """The unscheduled learning rate of each parameter, by id.

    A scheduler keeps it in ``initial_lr``: with the scheduled rate a decay would blow the factors up.
    """
    return {
        id(parameter): float(group.get("initial_lr", group["lr"]))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _target_norms(pair: LoraPair, rates: dict[int, float], config: ScaLoraConfig) -> tuple[float, float]:
    """The target norms for α and β of one layer."""
    for key, parameter in (("lora_A", pair.lora_A), ("lora_B", pair.lora_B)):
        if id(parameter) not in rates:
            raise ValueError(
                f"the optimizer does not hold {key} of module {pair.name!r}: build it from the parameters of this model"
            )
    # α's term of the loss bound, aᵢ(Gᵀaᵢ)ᵀ, comes from the step on B, so it goes with the learning rate of lora_A.
    norms = []
    for rate in (rates[id(pair.lora_A)], rates[id(pair.lora_B)]):
        if config.smoothness is not None and rate <= 0:
            raise ValueError(
                f"smoothness={config.smoothness} needs the base learning rate, which is {rate} for module "
                f"{pair.name!r}: attach after setting it, or give target_norm"
            )
        norms.append(config.column_norm(pair.scaling, rate))
    return norms[0], norms[1]
