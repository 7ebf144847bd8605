"""ReLoRA: at intervals, merge the adapter, initialise it anew, prune Adam's moments, and warm up the learning rate.

Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates", arXiv:2307.05695. Three things differ from the
authors' code (Guitaricet/relora):

- It prunes each of Adam's moments separately, which leaves non-zero first moments where the second moment is 0. Right
  after a merge the gradient of ``lora_A`` is 0, because ``lora_B`` is, so that these entries move by ``exp_avg / eps``
  and training diverges. Here, all moments of a parameter are pruned at the same entries, those where the first moment
  is smallest.
- Its schedule has one step with learning rate 0 between two cycles, and merges after that step. Here, the merge follows
  the last step of a cycle.
- It requires the number of steps to be a multiple of the interval. Here, a restart is skipped if the remaining steps
  would not go beyond its warm-up.

The full-rank training with which the paper begins corresponds, in fine-tuning, to the pre-training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scalora.model.adapters import UnsupportedLayerError, find_lora_pairs
from scalora.rescale.optimizers import UnsupportedOptimizerError, unwrapped_optimizer
from scalora.rescale.remainder import DenseRemainder
from scalora.rivals.method import BeforeTraining, Method

Reset = Literal["magnitude", "random", "zero"]


@dataclass(frozen=True)
class ReLora(Method):
    """ReLoRA.

    Raises:
        ValueError: an option is out of range.
    """

    steps_entries: ClassVar[bool] = False
    cannot_resume: ClassVar[str | None] = "a checkpoint does not contain the base weights that it has merged into"
    ordinary_adapter: ClassVar[bool] = False
    before_training: ClassVar[BeforeTraining] = "lost"

    interval: int = 50
    """Optimizer steps between merges. The default is that of the ReLoRA in MoRA's code (kongds/MoRA), which gives a run
    of a few hundred steps several merges. The paper's 5000 is for pre-training and exceeds most fine-tuning runs."""

    reset: Reset = "magnitude"
    """What a merge does to the adapter's moments: ``magnitude`` keeps the largest entries, as in the paper, ``random``
    keeps random entries, ``zero`` resets the optimizer state. The first two keep Adam's step count, as the authors'
    code does: for about ``1/(1 − beta2)`` steps the pruned second moments are too small, and steps are up to six times
    as large. ``zero`` avoids this."""

    prune: float = 0.99
    """Fraction of each moment's entries that is set to 0. The default is the paper's; the authors' code uses 0.999 with
    random entries."""

    restart_warmup_steps: int = 10
    """Steps after a merge over which the learning rate rises linearly from 0 to that of the schedule. The default is
    ``1/(1 − beta1)``, after which the first moment is an average again. The paper's 50 to 100 would take up the whole
    interval."""

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"interval={self.interval!r} must be at least 1")
        if self.reset not in get_args(Reset):
            raise ValueError(f"reset={self.reset!r} must be one of {', '.join(get_args(Reset))}")
        if not 0 <= self.prune <= 1:
            raise ValueError(f"prune={self.prune!r} must be from 0 to 1")
        if not 0 <= self.restart_warmup_steps <= self.interval:
            raise ValueError(
                f"restart_warmup_steps={self.restart_warmup_steps!r} must be from 0 to the interval, {self.interval}"
            )

    def callbacks(self) -> list[TrainerCallback]:
        """The callback that attaches ReLoRA to the Trainer's model and optimizer."""
        return [ReLoraCallback(self)]


class ReLoraRestarts:
    """Attaches ReLoRA to a PEFT model and its optimizer, through hooks of ``optimizer.step()``.

    Example:
        >>> ReLoraRestarts(model, optimizer, ReLora(interval=200))  # then train as usual

    The learning rate is changed during a step only, so that any scheduler can be used and reports its own values.

    Args:
        model: a model with PEFT LoRA layers and exactly one active adapter.
        optimizer: the model's optimizer, or a wrapper that holds it in ``.optimizer``, such as Accelerate's.
        settings: the options of ReLoRA.
        total_steps: number of training steps, by which restarts too close to the end are skipped. None: unknown.

    Raises:
        UnsupportedLayerError: a base weight is quantised, an adapter has a bias, or a layer is of a kind that
            `scalora.model.adapters.find_lora_pairs` rejects.
        UnsupportedOptimizerError: in the first step, if the optimizer's state is not elementwise and so can't be
            pruned, such as factored or 8-bit state.

    Attributes:
        restarts: number of restarts so far.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, settings: ReLora, total_steps: int | None = None
    ) -> None:
        self.restarts = 0
        self._settings = settings
        self._optimizer = unwrapped_optimizer(optimizer)
        self._pairs = find_lora_pairs(model)
        for pair in self._pairs:
            if pair.quantised:
                raise UnsupportedLayerError(
                    f"ReLoRA can't merge into module {pair.name!r}: its base weight is quantised "
                    f"({type(pair.weight).__name__}, {pair.weight.dtype}); load the base without quantisation"
                )
            if pair.layer.lora_bias.get(pair.adapter):
                raise UnsupportedLayerError(
                    f"ReLoRA can't merge the bias of the adapter of module {pair.name!r}; set lora_bias=False"
                )
        self._places = [DenseRemainder(pair.weight, transposed=pair.transposed) for pair in self._pairs]
        self._last_restart = None if total_steps is None else total_steps - settings.restart_warmup_steps - 1
        self._steps = 0
        self._steps_since_restart: int | None = None
        self._scheduled: list[Any] = []
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]

    def detach(self) -> None:
        """Remove the hooks: no more restarts, and the learning rate is that of the schedule."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def restart(self) -> None:
        """Merge ``s·B·A`` into the base weights, initialise the adapter as PEFT does, and reset its optimizer state."""
        for pair, place in zip(self._pairs, self._places, strict=True):
            place.add(pair.weight, pair.scaling * pair.lora_B, pair.lora_A.mT)
            pair.layer.reset_lora_parameters(pair.adapter, True)
        for parameter in self._parameters():
            if self._settings.reset == "zero":
                self._optimizer.state.pop(parameter, None)
            else:
                _prune(self._moments(parameter), self._settings)
        self.restarts += 1
        self._steps_since_restart = 0

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._scheduled = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self._ramp()

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for group, rate in zip(optimizer.param_groups, self._scheduled, strict=True):
            group["lr"] = rate
        if self._steps == 0 and self._settings.reset != "zero":
            for parameter in self._parameters():
                self._moments(parameter)
        self._steps += 1
        if self._steps_since_restart is not None:
            self._steps_since_restart += 1
        too_late = self._last_restart is not None and self._steps > self._last_restart
        if self._steps % self._settings.interval == 0 and not too_late:
            self.restart()

    def _ramp(self) -> float:
        if self._steps_since_restart is None or self._steps_since_restart >= self._settings.restart_warmup_steps:
            return 1.0
        return (self._steps_since_restart + 1) / self._settings.restart_warmup_steps

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for pair in self._pairs for parameter in (pair.lora_A, pair.lora_B)]

    def _moments(self, parameter: nn.Parameter) -> list[Tensor]:
        """The tensors of a parameter's state that have one entry per entry of the parameter."""
        state = self._optimizer.state.get(parameter, {})
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.numel() > 1}
        for key, value in tensors.items():
            if value.shape != parameter.shape or not value.is_floating_point():
                raise UnsupportedOptimizerError(
                    f"ReLoRA can't prune the state {key!r} of {type(self._optimizer).__name__}: it has dtype "
                    f"{value.dtype} and shape {tuple(value.shape)} for a parameter of shape {tuple(parameter.shape)}; "
                    "set reset='zero' or use torch.optim.AdamW"
                )
        return list(tensors.values())


def _prune(moments: list[Tensor], settings: ReLora) -> None:
    """Set the same entries in all moments of a parameter to 0, in place."""
    if not moments or settings.prune == 0:
        return
    if settings.reset == "random":
        kept = torch.rand_like(moments[0]) >= settings.prune
    else:
        size = moments[0].abs()
        # Not torch.quantile, which is limited to 16 million entries.
        kept = size > size.flatten().kthvalue(max(1, round(settings.prune * size.numel()))).values
    for moment in moments:
        moment.mul_(kept)


class ReLoraCallback(TrainerCallback):  # type: ignore[misc]
    """Attaches ReLoRA to a Trainer's model and optimizer.

    The learning rates that the Trainer logs are those of its schedule, without the warm-up after a restart.

    Args:
        settings: the options of ReLoRA.

    Attributes:
        settings: the options of ReLoRA.
        restarts: the restarts of the current or last training; None before training.
    """

    def __init__(self, settings: ReLora) -> None:
        self.settings = settings
        self.restarts: ReLoraRestarts | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the model and optimizer that the Trainer has created.

        Raises:
            ValueError: the run resumes or loads its best model at the end, for which checkpoints lack the base weights
                that were merged into; or it uses several processes, which would initialise adapters differently.
            UnsupportedLayerError: a layer that ReLoRA can't merge into.
        """
        if state.global_step:
            raise ValueError(
                f"ReLoRA can't resume at step {state.global_step}: {ReLora.cannot_resume}; start from the beginning"
            )
        if args.load_best_model_at_end:
            raise ValueError(
                "ReLoRA can't load its best checkpoint, which does not contain the merged base weights; set "
                "load_best_model_at_end=False"
            )
        if args.world_size > 1:
            raise ValueError(
                f"ReLoRA can't train in {args.world_size} processes, each of which would initialise its adapter "
                "differently; use one"
            )
        self.restarts = ReLoraRestarts(kwargs["model"], kwargs["optimizer"], self.settings, state.max_steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach. The next training attaches again."""
        if self.restarts is not None:
            self.restarts.detach()
