"""`ScaLora`: one rescale per optimizer step, in the paper's order, as a step pre-hook (paper, Algorithm 1).

gradients are final → solve for v → α, β → merge ``W += s·A·diag(1 − αβ)·Bᵀ`` → scale A, B, their gradients and their
optimizer state → the optimizer steps on Ã, B̃. `scalora.maths.reference` is the same for one bare layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.optim import Optimizer

from scalora.config import ScaLoraConfig
from scalora.maths.lowrank import DEFAULT_RTOL
from scalora.maths.scaling import Grams, Scaling, scaling_of_grams, solver_dtype
from scalora.model.adapters import LoraPair, by_rank, by_shape
from scalora.model.target_norms import target_norms
from scalora.parallel.data_parallel import unwrapped
from scalora.rescale import native
from scalora.rescale.kernels import PYTORCH, Kernels
from scalora.rescale.metrics import (
    LEFT_ALONE_BECAUSE,
    Rescaled,
    factored_metrics,
    remainder_energy,
    summarise,
)
from scalora.rescale.optimizers import refuse_closure, state_degrees, unwrapped_optimizer
from scalora.rescale.transport import scale_gradients_and_states
from scalora.saving.attach import attach, state_of
from scalora.saving.errors import StateError
from scalora.saving.random_state import check_random_state, random_state, set_random_state
from scalora.saving.state import check_base, check_content, check_fit, restore, saved_config
from scalora.saving.state_file import STATE_FILE, read_state, write_state

PARTS = ("scalora::solve", "scalora::merge", "scalora::transport")
"""The parts of a rescale, as a profiler's trace names them."""

# The share of a factored remainder that may be discarded before the user is told: what an exported adapter may leave
# out as well.
DISCARD_WARNING = DEFAULT_RTOL

ScalingRule = Callable[..., Scaling]
"""Chooses α and β for layers of one rank; called with their `Grams` and ``target_norm``, (layers, 2)."""

Transport = Callable[..., None]
"""Carries gradients and optimizer state along; called as `scale_gradients_and_states` is."""


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
        optimizer: any whose state can be carried over (see `scalora.register_optimizer`). A wrapper that holds the real
            optimizer in ``.optimizer`` (Accelerate's) is looked through.
        config: settings; the defaults when None.
        scaling_rule: chooses the factors of each rescale; the paper's optimum in `config.mode` when None. Another one
            makes a control experiment.
        transport: carries gradients and optimizer state through a rescale; exactly, unless a control experiment gives
            another one.

    Raises:
        UnsupportedLayerError: a module that can't be treated, by name.
        UnsupportedOptimizerError: an optimizer that can't be carried over, by name.
        ValueError: the optimizer does not hold an adapter parameter, or `smoothness` is given and a learning rate is 0.

    Attributes:
        config: the settings.
        optimizer: the real one, out of its wrapper.
        pairs: the adapted layers.
        target_norms: of each layer by name, for α and for β.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: ScaLoraConfig | None = None,
        *,
        scaling_rule: ScalingRule | None = None,
        transport: Transport = scale_gradients_and_states,
    ) -> None:
        self.config = config or ScaLoraConfig()
        self.optimizer = unwrapped_optimizer(optimizer)
        self._model = unwrapped(model)
        self._scaling_rule = scaling_rule or partial(scaling_of_grams, mode=self.config.mode)
        self._transport = transport
        self._degrees = state_degrees(self.optimizer)
        self.pairs, self._progress = attach(self._model, self.config.merge, self.config.remainder_rank)
        self.target_norms = target_norms(self.pairs, self.optimizer, self.config)
        self._groups = [by_shape(pairs) for pairs in by_rank(self.pairs)]
        self._kernels = self._chosen_kernels()
        self._progress.config = self.config
        self._progress.restart(step=0, rescales=0)
        self._constants: dict[tuple[str, ...], _Constants] = {}
        self._last: list[Rescaled] | None = None
        self._left_alone = {reason: torch.zeros(()) for reason in LEFT_ALONE_BECAUSE}
        self._warned: set[str] = set()
        self._hook = self.optimizer.register_step_pre_hook(self._before_step)

    @property
    def step(self) -> int:
        """Optimizer steps so far; in a step, the number of that step, counted from 1."""
        return self._progress.step

    def detach(self) -> None:
        """Stop rescaling. The model goes on as plain LoRA on its base and remainder as they are now."""
        self._hook.remove()
        self._warn_about_skipped_layers()

    def metrics(self) -> dict[str, float]:
        """What the last rescale did, and counts since attaching; empty before the first rescale. Waits for the device.

        Keys: ``scalora/column_share``, ``scalora/scalar_share``, ``scalora/left_alone_share`` and
        ``scalora/degenerate_share`` (of all layers; degenerate ones are among those left alone), quantiles of the
        factors over all columns ``scalora/alpha_p10 … beta_p90``, ``scalora/merge_norm`` (Frobenius norm of all that
        was merged at this rescale); counts so far: ``scalora/rescales``, and of layers left alone at a rescale
        ``scalora/nonfinite`` (NaN or infinity in the adapter or its gradient) and ``scalora/exploding`` (factors above
        a million or below a millionth). With a factored remainder also ``scalora/remainder_columns`` (the most of any
        layer) and ``scalora/discarded`` (what compressions have left out, as a share of the remainder's Frobenius
        norm).
        """
        self._warn_about_skipped_layers()
        if self._last is None:
            return {}
        counts = {f"scalora/{reason}": count.item() for reason, count in self._left_alone.items()}
        counts["scalora/rescales"] = float(self._progress.rescales)
        remainders = factored_metrics([pair.remainder for pair in self.pairs])
        self._warn_about_discarded(remainders.get("scalora/discarded", 0.0))
        return summarise(self._last, len(self.pairs)) | counts | remainders

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to go on exactly as if it had not stopped, as tensors, numbers and strings.

        The base weights where remainders were merged into them, or the factored remainders; the trained parameters; the
        optimizer's state; the counters and settings; the states of the random number generators. Tensors are not
        copied: `copy.deepcopy` a state that should outlive the next step. A learning-rate scheduler and the position in
        the data belong to the training loop.
        """
        self._warn_about_skipped_layers()
        return state_of(self._model, self.pairs) | {
            "optimizer": self.optimizer.state_dict(),
            "random": random_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` left off. A state without an optimizer (`save_pretrained`'s) restores the rest.

        Args:
            state: from `state_dict`.

        Raises:
            StateError: the state is of another base model, adapter or settings, lacks an entry, or has numbers that are
                not finite; the model is then as it was.
        """
        check_content(state)
        check_base(state, self._progress.fingerprint)
        saved = saved_config(state)
        if saved is not None and saved != self.config:
            raise StateError(f"the state was saved with {saved}, this engine has {self.config}: use the same settings")
        check_fit(self._model, self.pairs, state["tensors"])
        if "random" in state:
            check_random_state(state["random"])
        if "optimizer" in state:
            try:
                self.optimizer.load_state_dict(state["optimizer"])  # torch checks all of it before it changes anything
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise StateError(
                    f"the state's optimizer does not fit {type(self.optimizer).__name__}: {error}"
                ) from None
        restore(self._model, self.pairs, state["tensors"])
        if "random" in state:
            set_random_state(state["random"])
        self._progress.restart(step=state["step"], rescales=state["rescales"])

    def save(self, folder: str | Path) -> None:
        """Write `state_dict` to ``scalora_state.safetensors``, atomically: an older file stays until the new is whole.

        Args:
            folder: is made if it does not exist.

        Raises:
            OSError: it can't be written.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_state(Path(folder) / STATE_FILE, self.state_dict())

    def load(self, folder: str | Path) -> None:
        """Restore what `save`, or `save_pretrained` of an attached model, wrote.

        Args:
            folder: with a ``scalora_state.safetensors``.

        Raises:
            StateError: as `load_state_dict`; or the file is missing, damaged, or of another format version.
        """
        self.load_state_dict(read_state(Path(folder)))

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_closure("ScaLoRA", args, kwargs)
        self._progress.step += 1
        if not self.config.rescales_at(self._progress.step):
            return
        # GradScaler calls a fused optimizer even when it will skip the step; whether it will, only the device knows.
        skipped = getattr(optimizer, "found_inf", None)
        self._last = [self._rescale_group(shapes, skipped) for shapes in map(_with_gradients, self._groups) if shapes]
        self._progress.count_rescale(skipped)
        for scaling, _ in self._last:
            for reason, count in self._left_alone.items():
                self._left_alone[reason] = count.to(scaling.alpha.device) + getattr(scaling, reason).sum()

    def _rescale_group(self, shapes: list[list[LoraPair]], skipped: Tensor | None) -> Rescaled:
        """Solve, merge and carry over for layers of one rank.

        Each operation is one for all of the layers of a shape, and of all shapes in the solution, except for the merge,
        which is one for each weight.
        """
        sizes = [len(pairs) for pairs in shapes]
        with record_function(PARTS[0]):
            constants = self._constants_of([pair for pairs in shapes for pair in pairs])
            parts = [self._kernels.grams(*_factors_and_gradients(pairs)) for pairs in shapes]
            grams = Grams(*map(torch.cat, zip(*parts, strict=True)))
            scaling = self._scaling_rule(grams, target_norm=constants.target_norms)
            if skipped is not None:
                scaling = scaling.unless(skipped.to(scaling.alpha.device) > 0)
            dtype, exact = shapes[0][0].lora_A.dtype, scaling.alpha.dtype
            alpha, beta = scaling.alpha.to(dtype), scaling.beta.to(dtype)
            # 1 − αβ of the factors as they are applied, in the solver's precision: the function is kept to rounding.
            coefficients = constants.scaling * (1 - alpha.to(exact) * beta.to(exact))
        of_shapes = (torch.split(factors, sizes) for factors in (alpha, beta, coefficients))
        for pairs, *of_shape in zip(shapes, *of_shapes, strict=True):
            self._apply(pairs, *of_shape)
        return Rescaled(scaling, remainder_energy(grams, coefficients))

    def _apply(self, pairs: list[LoraPair], alpha: Tensor, beta: Tensor, coefficients: Tensor) -> None:
        """Merge the remainder of layers of one shape, then scale their factors and all that goes with them."""
        lora_A: list[Tensor] = [p.lora_A for p in pairs]
        lora_B: list[Tensor] = [p.lora_B for p in pairs]
        with record_function(PARTS[1]):
            self._kernels.merge([p.remainder for p in pairs], [p.weight for p in pairs], lora_B, lora_A, coefficients)
        with record_function(PARTS[2]):
            expand = self._kernels.expand_factors
            self._kernels.multiply(lora_B, expand(alpha[:, None, :], lora_B))
            self._kernels.multiply(lora_A, expand(beta[:, :, None], lora_A))
            self._carry_over(lora_B, expand(beta[:, None, :], lora_B))
            self._carry_over(lora_A, expand(alpha[:, :, None], lora_A))

    def _carry_over(self, parameters: list[Tensor], factors: list[Tensor]) -> None:
        self._transport(self.optimizer, self._degrees, parameters, factors, self._kernels.multiply)

    def _chosen_kernels(self) -> Kernels:
        on_cpu = any(pair.lora_A.is_cpu for pair in self.pairs)
        return native.build() if self.config.native and on_cpu else PYTORCH

    def _constants_of(self, pairs: list[LoraPair]) -> _Constants:
        """Target norms and scalings on the device, sent there again only when the layers or PEFT's scaling change."""
        names, scalings = tuple(pair.name for pair in pairs), [pair.scaling for pair in pairs]
        # Under the names alone, so that a scaling on a schedule does not leave one set behind at every step.
        known = self._constants.get(names)
        if known is None or known.scalings != scalings:
            device = pairs[0].lora_A.device
            dtype = solver_dtype(device)
            norms = torch.tensor([self.target_norms[name] for name in names], dtype=dtype)
            scaling = torch.tensor(scalings, dtype=dtype)[:, None]
            known = self._constants[names] = _Constants(scalings, norms.to(device), scaling.to(device))
        return known

    def _warn_about_skipped_layers(self) -> None:
        """Warn once for each reason. Here and not in the step, which must not wait for the device."""
        for reason, explanation in LEFT_ALONE_BECAUSE.items():
            if reason not in self._warned and (count := int(self._left_alone[reason].item())):
                self._warned.add(reason)
                warnings.warn(f"ScaLoRA left a layer alone at {count} rescales: {explanation}", stacklevel=3)

    def _warn_about_discarded(self, discarded: float) -> None:
        if discarded > DISCARD_WARNING and "discarded" not in self._warned:
            self._warned.add("discarded")
            warnings.warn(
                f"remainder_rank={self.config.remainder_rank} is too small for this run: {discarded:.1e} of the "
                "factored remainder has been discarded; raise it, or set merge='dense'",
                stacklevel=3,
            )


def _with_gradients(shapes: list[list[LoraPair]]) -> list[list[LoraPair]]:
    return list(filter(None, ([pair for pair in pairs if pair.has_gradients] for pairs in shapes)))


def _factors_and_gradients(pairs: list[LoraPair]) -> Iterator[list[Tensor]]:
    """lora_B, its gradients, lora_A, its gradients."""
    for parameters in ([pair.lora_B for pair in pairs], [pair.lora_A for pair in pairs]):
        yield list(parameters)
        yield [p.grad for p in parameters if p.grad is not None]
