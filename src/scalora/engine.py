"""`ScaLora`: rescales the adapter before optimizer steps, as a step pre-hook (paper, section 5 and Algorithm 1).

The order of a step: gradients are final → solve for v → α, β → merge ``W += s·A·diag(1 − αβ)·Bᵀ`` → scale A, B, their
gradients and their optimizer state → the optimizer steps on Ã, B̃. `scalora.maths.reference` has the same step for a
single layer.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scalora.config import ScaLoraConfig
from scalora.maths.matrix import matrix_scaling_of_grams
from scalora.maths.scaling import scaling_of_grams
from scalora.model.adapters import LoraPair, find_lora_pairs
from scalora.model.fused_kernels import check_fused_kernels
from scalora.model.placement import check_places, resolve_merge
from scalora.model.present import check_present, present_factors
from scalora.model.target_norms import BaseRates, target_norms
from scalora.model.tied_factors import sum_gradients
from scalora.model.trainable_base import check_gradients_pass
from scalora.pair_adamw import PairAdamW
from scalora.parallel.data_parallel import keep_out_of_broadcasts, unwrapped
from scalora.parallel.layout import laid_out
from scalora.parallel.optimizer_state import load_optimizer_state, optimizer_state
from scalora.parallel.processes import failing_together, process_rank
from scalora.parallel.sharded_pairs import check_not_sharded_since, check_optimizer_of_parts, check_shards
from scalora.parallel.shards import reshard, wholes_for
from scalora.parallel.zero import check_owner, zero_of
from scalora.rescale import native
from scalora.rescale.kernels import PYTORCH, Kernels
from scalora.rescale.metrics import (
    LEFT_ALONE_BECAUSE,
    Rescaled,
    factored_metrics,
    summarise,
)
from scalora.rescale.moments import check_moment
from scalora.rescale.notices import Notices
from scalora.rescale.optimizers import (
    MATRIX,
    UnsupportedOptimizerError,
    evaluate_closure,
    state_kinds,
    unwrapped_optimizer,
)
from scalora.rescale.other_optimizers import WatchOfOtherOptimizers
from scalora.rescale.remainder import DenseRemainder, FactoredRemainder
from scalora.rescale.replay import GraphMemory
from scalora.rescale.transport import (
    check_states,
    scale_gradients_and_states,
)
from scalora.rescaling import Rescaling, ScalingRule, Transport
from scalora.saving.attach import attach
from scalora.saving.errors import StateError
from scalora.saving.model_state import state_of
from scalora.saving.optimizer_state import COUNTS, CountsInOptimizer
from scalora.saving.random_state import random_state, set_random_state, why_of_another_process
from scalora.saving.run_state import read_own, shards_to_be_like, write_sharded, write_whole
from scalora.saving.state import check_all, check_config, gather, restore

_NO_DECAY = (
    "PairAdamW's weight_decay pulls weights towards those of the base, which a merge into them does not keep; set "
    "weight_decay=0, or merge='factored'"
)

# Engines that are attached, or the last ones that were. Each model and each optimizer has at most one.
_ENGINES: weakref.WeakSet[ScaLora] = weakref.WeakSet()


class ScaLora:
    """Attaches ScaLoRA to a PEFT model and its optimizer.

    Examples:
        >>> model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> ScaLora(model, optimizer, ScaLoraConfig())  # and train as before

    A model and an optimizer have one engine at a time: a new one replaces, and detaches, an earlier one of either.
    Nothing has been changed if an error is raised.

    Several processes of one data-parallel run have an engine each. What they do is equal to the bit as long as their
    gradients are, as those of `DistributedDataParallel`, and their devices of one kind; nothing is sent around. With
    FSDP2 (`fully_shard`), which has to come first, each rescales its own rows, and all must take every step
    (docs/distributed.md).

    Args:
        model: a model with PEFT LoRA layers and one adapter, which is active. With `DistributedDataParallel`, the model
            or the wrapper around it.
        optimizer: an optimizer whose state can be transported: most of PyTorch's, bitsandbytes' and others
            (docs/optimizers.md), or one that was added with `scalora.register_optimizer`. May be a wrapper that holds
            the optimizer in ``.optimizer``, such as Accelerate's.
        config: the settings. None: the defaults.
        scaling_rule: chooses the factors of each rescale. None: the paper's optimum, with ``config.mode``. Other rules
            are for control experiments.
        transport: transports gradients and optimizer state through a rescale; by default exactly. Other functions are
            for control experiments.

    Raises:
        UnsupportedLayerError: a module is not supported; the message names it.
        UnsupportedOptimizerError: the optimizer's state can't be transported; the message says why.
        ValueError: the optimizer does not hold an adapter parameter; `smoothness` or `turn` determines the target norms
            and a base learning rate is not positive, or the optimizer is another than `scalora.PairAdamW`; or a
            `transport` is given for a rescale by matrices.

    Attributes:
        config: the settings.
        optimizer: the optimizer itself, without a wrapper.
        pairs: the adapted layers.
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
        self._zero = zero_of(optimizer)
        self._model = unwrapped(model)
        self._kinds = state_kinds(self.optimizer, self.config.mode)
        by_matrices = self.config.mode == "matrix" or MATRIX in self._kinds.values()
        if by_matrices and transport is not scale_gradients_and_states:
            raise ValueError(
                f"transport carries column scalings, but with mode={self.config.mode!r} and "
                f"{type(self.optimizer).__name__} a rescale is by matrices: leave it out, or use another mode and AdamW"
            )
        if self.config.norm_from_turn and not isinstance(self.optimizer, PairAdamW):
            raise ValueError(
                f"mode='matrix' with {type(self.optimizer).__name__} needs target_norm, the norm of the orthonormal "
                "columns: only with scalora.PairAdamW is it known from the learning rate"
            )
        reshard(self._model)
        pairs = find_lora_pairs(self._model, sharded=True, all_shapes=True, masters=self._zero is not None)
        check_gradients_pass(pairs)
        check_shards(pairs)
        check_optimizer_of_parts(pairs, self.optimizer, self._kinds)
        check_owner(model, pairs, self._zero)
        if self._zero is not None:
            self._zero.check_pairs(pairs, self._kinds)
        check_places(pairs, self.config.merge, self.config.remainder_rank)
        merge = resolve_merge(pairs, self.config.merge, self.config.remainder_rank)
        check_fused_kernels(self._model, merge)
        if merge != "factored" and isinstance(self.optimizer, PairAdamW) and self.optimizer.decays:
            raise UnsupportedOptimizerError(_NO_DECAY)
        self._rates = BaseRates(pairs, self._zero or self.optimizer)
        target_norms(pairs, self._rates.current(), self.config)
        self._check_states(pairs)
        kernels = self._chosen_kernels(pairs)
        # Nothing has been changed up to here.
        self.pairs, self._progress = attach(self._model, self.config.merge, self.config.remainder_rank, self._zero)
        keep_out_of_broadcasts(model)
        self._replace_earlier_engines()
        self._rescaling = Rescaling(
            laid_out(self.pairs, self.optimizer, self._zero, self._kinds, by_matrices=by_matrices),
            self.config,
            self._kinds,
            kernels,
            scaling_rule or _rule_of(self.config),
            transport,
            # The exact optimum takes as many steps as it needs, and of others' rules nothing is known.
            repeatable=scaling_rule is None
            and transport is scale_gradients_and_states
            and (self.config.mode != "matrix" or self.config.optimum == "polar"),
            memory=self.optimizer.graph_memory if isinstance(self.optimizer, PairAdamW) else GraphMemory(),
        )
        self._progress.config = self.config
        self._progress.base_rates = self._rates.current()
        self._progress.restart(step=0, rescales=0)
        self._last: list[Rescaled] | None = None
        self._had_gradients = False
        self._had_steps = False
        self._checked_states = False
        self._replaced = False
        self._left_alone = {reason: torch.zeros(()) for reason in LEFT_ALONE_BECAUSE}
        self._notices = Notices(self.config)
        self._hook = self.optimizer.register_step_pre_hook(self._before_step)
        self._watch = WatchOfOtherOptimizers(self._model, self.optimizer, present_factors(self.pairs))
        check = partial(check_config, config=self.config)
        self._counts = CountsInOptimizer(self.optimizer, self._counts_to_save, check, self._restore_counts)
        self._attached = True
        _ENGINES.add(self)

    @property
    def step(self) -> int:
        """Number of optimizer steps so far; during a step, the number of that step, counted from 1."""
        return self._progress.step

    @property
    def target_norms(self) -> dict[str, tuple[float, float]]:
        """For each layer's name, the target norm for α and the one for β.

        With `smoothness`, they follow PEFT's scalings and the base learning rates (`scalora.model.target_norms`).
        """
        return target_norms(self.pairs, self._rates.current(), self.config)

    @property
    def is_sharded(self) -> bool:
        """Whether this process has only its part of the model or of the optimizer's state (FSDP2, DeepSpeed's ZeRO)."""
        return self._zero is not None or any(pair.is_sharded for pair in self.pairs)

    def detach(self) -> None:
        """Stop rescaling. From now on the model trains as plain LoRA on its current base and remainder.

        Warns if the run had no rescale.
        """
        self._hook.remove()
        self._watch.stop()
        self._rescaling.forget_recording()
        self._attached = False
        self._notices.about_layers(self._left_alone)
        if not self._replaced:
            # A run that was resumed may have had its rescales before.
            active = self._had_gradients or self._last is None
            kind, rescales = type(self.optimizer).__name__, self._progress.rescales
            self._notices.about_run(kind, self.step, rescales, had_gradients=active)

    def metrics(self) -> dict[str, float]:
        """Metrics of the last rescale, and counts since attaching. Waits for the device.

        - ``scalora/column_share`` and ``scalora/scalar_share``, or ``scalora/matrix_share`` with ``mode="matrix"``, and
          ``scalora/left_alone_share``: shares of the layers by kind of scaling; ``scalora/degenerate_share``: share of
          the layers that were left alone because their inputs have no optimum;
        - ``scalora/alpha_p10``, ``_p50``, ``_p90``, ``scalora/beta_p10``, ``_p50``, ``_p90``: quantiles of the factors
          over all columns, of matrices of their singular values;
        - ``scalora/merge_norm``: Frobenius norm of everything that this rescale moved into the remainder;
        - ``scalora/rescales``: number of rescales so far;
        - ``scalora/nonfinite``, ``scalora/exploding``: how often so far a layer was left alone because of NaN or
          infinite entries, or because of factors above a million or below a millionth;
        - with a factored remainder, ``scalora/remainder_columns``: the largest number of columns of any layer, and
          ``scalora/discarded``: the norm of what compressions have left out, relative to that of the remainder.

        Returns:
            The metrics by name; nothing before this engine's first rescale, but, of one that was replaced, the number
            of rescales by now.
        """
        self._notices.about_layers(self._left_alone)
        rescales = float(self._progress.rescales)
        if self._last is None:
            return {"scalora/rescales": rescales} if self._replaced and rescales else {}
        counts = {f"scalora/{reason}": count.item() for reason, count in self._left_alone.items()}
        counts["scalora/rescales"] = rescales
        remainders = factored_metrics([pair.remainder for pair in self.pairs])
        self._notices.about_discarded(remainders.get("scalora/discarded", 0.0))
        return summarise(self._last, sum(pair.experts for pair in self.pairs)) | counts | remainders

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to continue exactly as if it had not stopped, as tensors, numbers and strings.

        That is the base weights with the remainders merged into them, or the factored remainders; the trained
        parameters; the optimizer's state; counters, settings and base learning rates; the states of this process's
        random number generators. The learning rate scheduler and the position in the data belong to the training loop.
        Tensors are not copied: use `copy.deepcopy` to keep a state beyond the next step. With FSDP2 they are DTensors.
        With DeepSpeed's ZeRO they are whole ones on the CPU, and all processes must take part.

        Returns:
            The state, which `load_state_dict` takes.
        """
        state = self._state()
        return state if self._zero is None else wholes_for(state, keep=True)

    def _state(self) -> dict[str, Any]:
        """The state, with this process's part of what is divided over processes."""
        self._notices.about_layers(self._left_alone)
        reshard(self._model)
        if not self._replaced:
            self._progress.base_rates = self._rates.current()
        optimizer = optimizer_state(self.optimizer, self._zero)
        return state_of(self._model, self.pairs, self._zero) | {
            "optimizer": {key: value for key, value in optimizer.items() if key != COUNTS},
            "random": random_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`, to continue from there.

        The random number generators keep their own states, with a warning, if the state is from another process of a
        run, or from a run with another number of processes.

        Args:
            state: the state. One without an optimizer, as `save_pretrained` writes it, restores everything else.

        Raises:
            StateError: the state belongs to another base model, adapter or settings, lacks an entry, or has NaN or
                infinite entries. The model has not been changed then.
        """
        reshard(self._model)
        check_all(state, self._model, self.pairs, self._progress.fingerprint, self.config, self._zero)
        self._restore(state)

    def _restore(self, state: dict[str, Any]) -> None:
        """Restore a state that has passed `check_all`."""
        if "optimizer" in state:
            try:
                load_optimizer_state(state["optimizer"], self.optimizer, self._zero, self._kinds)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise StateError(
                    f"the state's optimizer does not fit {type(self.optimizer).__name__}: {error}"
                ) from None
        restore(self._model, self.pairs, state["tensors"], self._zero)
        if "random" in state:
            if (why := why_of_another_process(state["random"])) is None:
                set_random_state(state["random"])
            else:
                warnings.warn(
                    f"random number generators are not restored: {why}; the run goes on, but not as if it had not "
                    "stopped",
                    stacklevel=2,
                )
        self._restore_counts(state, rates="optimizer" in state or state.get("base_rates") is not None)

    def _counts_to_save(self) -> dict[str, Any]:
        """What belongs to the state of a run beside the tensors of the model and of the optimizer."""
        counts = self._progress
        return {
            "step": counts.step,
            "rescales": counts.rescales,
            "config": self.config.to_dict(),
            "base_rates": self._rates.current(),
        }

    def _restore_counts(self, state: Mapping[str, Any], rates: bool = True) -> None:
        if rates:
            self._rates.restore(state.get("base_rates"))
        self._progress.base_rates = self._rates.current()
        self._progress.restart(step=state["step"], rescales=state["rescales"])
        self._checked_states = False
        if state["rescales"]:
            for pair in self.pairs:
                if isinstance(pair.remainder, DenseRemainder):
                    pair.remainder.changed = True

    def save(self, folder: str | Path, *, sharded: bool = False, resumable: bool = True) -> None:
        """Write `state_dict` to ``scalora_state.safetensors`` in a folder, atomically.

        Of several processes, the first one writes it. The others write the states of their random number generators
        beside it, ``scalora_random_1.safetensors`` and so on, and no process waits for another. With FSDP2 and
        DeepSpeed's ZeRO all must take part, and the file is still one whole file.

        Args:
            folder: the folder; created if it does not exist. An earlier state in it is replaced once the new one is
                complete.
            sharded: with FSDP2, whether every process writes its own shards instead, at the same time, to a folder
                ``scalora_state`` in the folder, which all processes must see. The first process then needs no memory
                for the whole state. Whatever reads the file reads the shards too. False: one file, because that is
                easier to handle.
            resumable: whether with the optimizer's state and the states of random number generators. Without them it
                is the state of the model, as `save_pretrained` writes it.

        Raises:
            OSError: the state can't be written; an earlier one is unchanged.
        """
        rank = process_rank()
        state = self._state() if rank == 0 or self.is_sharded else {}
        if not resumable:
            state = {key: value for key, value in state.items() if key not in ("optimizer", "random")}
        if sharded and self.is_sharded and self._zero is None:
            write_sharded(Path(folder), state, self.step)
            return
        if not self.is_sharded:
            if rank == 0 or resumable:
                write_whole(Path(folder), state, self.step)
            return
        state = wholes_for(state, keep=rank == 0)
        with failing_together(OSError):
            if rank == 0 or resumable:
                write_whole(Path(folder), state, self.step)

    def load(self, folder: str | Path) -> None:
        """Restore a state that `save` wrote, or `save_pretrained` of a model with ScaLoRA attached.

        Args:
            folder: a folder with a ``scalora_state.safetensors``, or with the shards that a sharded run has saved in
                any number of processes. With several processes, all load it, and each restores its own random number
                generators.

        Raises:
            StateError: the file is missing, damaged or of another format version; or the state belongs to another base
                model, adapter or settings, lacks an entry, or has NaN or infinite entries. The model has not been
                changed then.
        """
        if not self.is_sharded:
            self.load_state_dict(read_own(Path(folder)))
            return
        reshard(self._model)
        with failing_together(StateError):  # an infinite entry is in the shards of one process only
            like = None
            if self._zero is None:
                like = dict(shards_to_be_like(gather(self._model, self.pairs), self.optimizer))
            state = read_own(Path(folder), like)
            check_all(state, self._model, self.pairs, self._progress.fingerprint, self.config, self._zero)
        self._restore(state)

    @torch.no_grad()
    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._had_steps:
            check_not_sharded_since(self.pairs, divided=self._zero is not None)
            self._had_steps = True
        check_moment(type(optimizer).__name__, self.pairs[0].lora_A.device)
        with_loss = evaluate_closure(args, kwargs)
        # DeepSpeed has its optimizer step one group after the other.
        begins = self._zero is None or self._zero.begins_step()
        if begins:
            sum_gradients(self.pairs)
        rescales = self.config.rescales_at(self.step + begins)
        if rescales and begins:
            self._check_before_rescale()
        self._progress.step += begins
        if rescales:
            self._rescale(getattr(optimizer, "found_inf", None), begins=begins)
        if isinstance(self.optimizer, PairAdamW) and self.optimizer.decays:
            self._decay_remainders(self.optimizer)
        return with_loss

    def _decay_remainders(self, optimizer: PairAdamW) -> None:
        """Have the remainders decay with the products that they were split off from."""
        for pair, kept in optimizer.kept_products():
            if not isinstance(pair.remainder, FactoredRemainder):
                raise UnsupportedOptimizerError(_NO_DECAY)
            pair.remainder.scale(kept)

    def _check_before_rescale(self) -> None:
        """Raise what a rescale could raise, before it changes anything."""
        for pair in self.pairs:
            pair.check_ready()
        if self._zero is None:  # whose optimizer holds copies
            check_present(self.pairs, self.optimizer)
        if self.config.norm_from_rates:
            self._rates.observe()
            self._progress.base_rates = self._rates.current()
        if not self._checked_states:
            # The optimizer has no state before its first step.
            self._checked_states = self._check_states(self.pairs)

    def _check_states(self, pairs: list[LoraPair]) -> bool:
        factors: list[Tensor] = [p for pair in pairs for p in (pair.lora_A, pair.lora_B)]
        parameters = factors if self._zero is None else self._zero.flats
        return check_states(self.optimizer, self._kinds, parameters, matrix=self.config.mode == "matrix")

    def _rescale(self, skipped: Tensor | None, *, begins: bool = True) -> None:
        """Rescale all layers that have gradients and are about to be stepped.

        Args:
            begins: whether these are the first of a step.
            skipped: GradScaler calls a fused optimizer even if it is going to skip the step, which only the device
                knows: a scalar that is positive then. None if it can't be skipped.
        """
        self._had_gradients = (
            self._had_gradients or self._zero is not None or any(pair.has_gradients for pair in self.pairs)
        )
        rescaled = self._rescaling.run(self._progress.base_rates or {}, skipped, self.step)
        if begins:
            self._last = []
            self._progress.count_rescale(skipped)
        self._last = [*(self._last or []), *rescaled]
        self.pairs[0].layer.factor_guard.forget_values()
        for scaling, _ in rescaled:
            for reason, count in self._left_alone.items():
                self._left_alone[reason] = count.to(scaling.choice.device) + getattr(scaling, reason).sum()

    def _chosen_kernels(self, pairs: list[LoraPair]) -> Kernels:
        on_cpu = any(pair.lora_A.is_cpu for pair in pairs)
        return native.build() if self.config.native and on_cpu else PYTORCH

    def _replace_earlier_engines(self) -> None:
        """Detach the engines of the same model or optimizer, so that steps are counted and rescaled once."""
        for earlier in list(_ENGINES):
            of_model = earlier._model is self._model or earlier._progress is self._progress
            if of_model or earlier.optimizer is self.optimizer:
                if earlier._attached:
                    earlier._replaced = True
                    earlier.detach()
                earlier._counts.remove()
                _ENGINES.discard(earlier)


def _rule_of(config: ScaLoraConfig) -> ScalingRule:
    if config.mode == "matrix":
        return partial(matrix_scaling_of_grams, optimum=config.optimum)
    return partial(scaling_of_grams, mode=config.mode)
