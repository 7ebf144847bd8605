"""`ReLora`: merge, begin the adapter anew, prune Adam's moments, warm up again (Lialin et al., arXiv:2307.05695).

As in the paper and its code (Guitaricet/relora), with three differences:

- They prune each of Adam's moments by itself, which leaves first moments where the second is 0. Right after a merge
  lora_A's gradient is 0 (lora_B is), so such an entry moves by ``exp_avg / eps``: training diverges. Here all moments
  of a parameter are pruned at the same entries, those where the first one is smallest.
- Their schedule has one step of learning rate 0 between two cycles, and they merge after it. Here the merge comes right
  after a cycle's last step.
- They ask that the steps be a multiple of the interval. Here there is no restart when the steps left would not go
  beyond its warm-up.

The paper's full-rank training before the first cycle is, in fine-tuning, the pre-training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scalora.model.adapters import UnsupportedLayerError, find_lora_pairs
from scalora.rescale.optimizers import UnsupportedOptimizerError, unwrapped_optimizer
from scalora.rescale.remainder import DenseRemainder
from scalora.rivals.method import Method

Reset = Literal["magnitude", "random", "zero"]
_RESETS = ("magnitude", "random", "zero")


@dataclass(frozen=True)
class ReLora(Method):
    """ReLoRA as a method.

    Attributes:
        interval: optimizer steps between merges. The paper's 5000 are for pre-training and longer than most
            fine-tuning; 50 is what MoRA's code (kongds/MoRA) takes for its ReLoRA, and gives a run of a few hundred
            steps several merges.
        reset: what happens to the adapter's moments at a merge: ``"magnitude"`` keeps the largest entries (the paper),
            ``"random"`` keeps random ones, ``"zero"`` begins the optimizer anew. The first two keep Adam's step
            count, as the paper's code does, so that for about ``1/(1 − beta2)`` steps the moments that were pruned
            count as smaller than they are and steps are up to six times as large; ``"zero"`` does not have this.
        prune: the share of each moment that is set to 0. The paper's; the 0.999 in its code is its way to zero, with
            random entries.
        restart_warmup_steps: steps over which the learning rate rises linearly from 0 to the schedule's after a merge.
            The paper's 50 to 100 would be all of the interval; 10 are ``1/(1 − beta1)``, after which the first moment
            is an average again.

    Raises:
        ValueError: a value that makes no sense.
    """

    cannot_resume: ClassVar[str | None] = "a checkpoint does not hold the base that it has merged into"

    interval: int = 50
    reset: Reset = "magnitude"
    prune: float = 0.99
    restart_warmup_steps: int = 10

    ordinary_adapter: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"interval={self.interval!r} must be at least 1 step")
        if self.reset not in _RESETS:
            raise ValueError(f"reset={self.reset!r} must be one of {', '.join(_RESETS)}")
        if not 0 <= self.prune <= 1:
            raise ValueError(f"prune={self.prune!r} is a share: from 0 to 1")
        if not 0 <= self.restart_warmup_steps <= self.interval:
            raise ValueError(
                f"restart_warmup_steps={self.restart_warmup_steps!r} must be from 0 to the interval, {self.interval}"
            )

    def callbacks(self) -> list[TrainerCallback]:
        """The restarts."""
        return [ReLoraCallback(self)]


class ReLoraRestarts:
    """Attaches ReLoRA to a PEFT model and its optimizer: all happens in hooks of ``optimizer.step()``.

    Example:
        >>> ReLoraRestarts(model, optimizer, ReLora(interval=200))  # and train as before

    The learning rate is multiplied by the ramp for the length of a step only, so that any scheduler can be used and
    sees, and reports, its own values.

    Args:
        model: with PEFT LoRA layers, exactly one adapter active.
        optimizer: of the model; a wrapper with the real one in ``.optimizer`` (Accelerate's) is looked through.
        settings: interval and so on.
        total_steps: of the training, if known: there is no restart too near the end.

    Raises:
        UnsupportedLayerError: a module that can't be treated: a quantised base weight, ``lora_bias``, or whatever
            `find_lora_pairs` refuses.
        UnsupportedOptimizerError: in the first step, a state that has no entries to prune (factored, 8-bit).

    Attributes:
        restarts: how many there have been.
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
                    f"ReLoRA can't merge the adapter's bias of module {pair.name!r}; set lora_bias=False"
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
        """Stop restarting, and leave the learning rate to the schedule."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def restart(self) -> None:
        """Merge ``s·B·A`` into the base weights, begin the adapter as PEFT does, and reset its optimizer state."""
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
        """The entries of a parameter's state that are elementwise; step counts and the like are no moments."""
        state = self._optimizer.state.get(parameter, {})
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.numel() > 1}
        for key, value in tensors.items():
            if value.shape != parameter.shape or not value.is_floating_point():
                raise UnsupportedOptimizerError(
                    f"ReLoRA can't prune the state {key!r} of {type(self._optimizer).__name__}: it is {value.dtype} of "
                    f"shape {tuple(value.shape)} for a parameter of shape {tuple(parameter.shape)}; set reset='zero' "
                    "or use torch.optim.AdamW"
                )
        return list(tensors.values())


def _prune(moments: list[Tensor], settings: ReLora) -> None:
    """Set the same entries of all moments of a parameter to 0, in place."""
    if not moments or settings.prune == 0:
        return
    if settings.reset == "random":
        kept = torch.rand_like(moments[0]) >= settings.prune
    else:
        size = moments[0].abs()
        # Not torch.quantile, which refuses more than 16 million entries.
        kept = size > size.flatten().kthvalue(max(1, round(settings.prune * size.numel()))).values
    for moment in moments:
        moment.mul_(kept)


class ReLoraCallback(TrainerCallback):  # type: ignore[misc]
    """Trains with ReLoRA in a Trainer.

    The learning rates that a Trainer logs are its schedule's, without the ramps.

    Raises:
        ValueError: at the start of training, for what needs checkpoints (resuming, ``load_best_model_at_end``): a
            Trainer's hold the adapter only, not the base that was merged into; and for more than one process, which
            would begin their adapters differently. Also whatever `ReLoraRestarts` raises.

    Attributes:
        restarts: the `ReLoraRestarts` that is attached; None before training.
    """

    def __init__(self, settings: ReLora) -> None:
        self.settings = settings
        self.restarts: ReLoraRestarts | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the model and optimizer that the Trainer has built."""
        if state.global_step:
            raise ValueError(f"ReLoRA can't resume at step {state.global_step}: {ReLora.cannot_resume}; start anew")
        if args.load_best_model_at_end:
            raise ValueError(
                "ReLoRA can't go back to its best checkpoint, which does not hold the merged base; set "
                "load_best_model_at_end=False"
            )
        if args.world_size > 1:
            raise ValueError(
                f"ReLoRA trains in one process, not in {args.world_size}: each would begin its adapter differently"
            )
        self.restarts = ReLoraRestarts(kwargs["model"], kwargs["optimizer"], self.settings, state.max_steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach: training again attaches anew."""
        if self.restarts is not None:
            self.restarts.detach()
