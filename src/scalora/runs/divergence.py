"""Stops a run that has gone wrong: a loss, gradient or weight that is NaN or infinite never gets well again."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scalora.parallel.job import first_of_any
from scalora.parallel.processes import smallest
from scalora.parallel.shards import local
from scalora.runs.errors import DivergedError
from scalora.saving.checkpoints import last_finite_checkpoint

# Steps between looks at a device that has to be waited for. More would train on for longer with a model that is lost.
_STEPS = 10

_NEVER = float("inf")


class DivergenceWatch(TrainerCallback):  # type: ignore[misc]
    """Stops a training whose loss, gradient norm or trained weights are not finite, before they are saved.

    The loss of every step is looked at, whatever is logged. Must come after what writes the logs: the step that went
    wrong is logged before training stops.

    Args:
        trainer: the trainer to watch.

    Attributes:
        loss_sum: the sum of the losses of all steps that this process has taken, as a scalar on its device.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.loss_sum = torch.tensor(0.0, device=trainer.args.device)
        self._first_bad = torch.tensor(_NEVER, device=trainer.args.device)
        self._found: tuple[int, str] | None = None
        self._said_evaluation = False
        step = trainer.training_step

        @wraps(step)
        def watched(*args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = step(*args, **kwargs)
            # Kept on the device, which is not waited for here.
            number = torch.where(loss.isfinite().all(), _NEVER, trainer.state.global_step + 1.0)
            self._first_bad = torch.minimum(self._first_bad, number.to(self._first_bad))
            self.loss_sum += loss.to(self.loss_sum)
            return loss

        trainer.training_step = watched

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the losses so far, and at the weights before they are saved; what is bad is logged next."""
        keeps = control.should_save or control.should_evaluate or control.should_training_stop
        if keeps or args.device.type == "cpu" or state.global_step % _STEPS == 0:
            self._look(kwargs["model"] if keeps else None, state)
            control.should_log = control.should_log or self._found is not None

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The same for what is saved after an epoch."""
        self._look(kwargs["model"], state)
        if self._found is not None:
            self._stop(state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Stop if something is not finite.

        Raises:
            DivergedError: with the step, the last checkpoint that is finite, and what to try.
        """
        logs = logs or {}
        if "loss" in logs:
            # With float16 the scaled gradients may overflow, and the scaler skips that step.
            for name in ["loss"] if args.fp16 else ["loss", "grad_norm"]:
                value = float(logs.get(name, 0.0))
                if not math.isfinite(value) and (self._found is None or name == "loss"):
                    step = state.global_step if self._found is None else self._found[0]
                    self._found = step, f"{name} is {value}"
            self._look(None, state)
        if self._found is not None:
            self._stop(state)
        value = float(logs.get("eval_loss", 0.0))
        if not math.isfinite(value) and not self._said_evaluation:
            self._said_evaluation = True
            warnings.warn(
                f"eval_loss is {value} at step {state.global_step}, although the training loss and the trained weights "
                "are finite: check the data of data.eval",
                stacklevel=2,
            )

    def check_result(self) -> None:
        """Check the model at the end of training.

        Raises:
            DivergedError: it has NaN or infinite entries.
        """
        self._look(None, self._trainer.state)
        if self._found is None and (name := first_of_any(first_not_finite(self._trainer.model))) is not None:
            self._found = self._trainer.state.global_step, f"{name!r} has NaN or infinite entries"
        if self._found is not None:
            self._stop(self._trainer.state)

    def _look(self, model: nn.Module | None, state: TrainerState) -> None:
        if self._found is not None:
            return
        first = float(smallest(self._first_bad))
        if first < _NEVER:
            self._found = int(first), "loss is not finite"
        elif model is not None and (name := first_of_any(_first_bad(_trained(model)))) is not None:
            self._found = state.global_step, f"{name!r} has NaN or infinite entries"

    def _stop(self, state: TrainerState) -> None:
        assert self._found is not None
        step, what = self._found
        checkpoint = last_finite_checkpoint(self._trainer.args.output_dir)
        kept = "no checkpoint was written before" if checkpoint is None else f"the last good one is {str(checkpoint)!r}"
        raise DivergedError(
            f"training diverged: {what} at step {step} of {state.max_steps}. No result is written; {kept}. "
            "Lower training.learning_rate, lengthen its warm-up, set training.max_grad_norm, or check the data, and "
            "train again with --overwrite",
            step,
        )


def first_not_finite(model: nn.Module) -> str | None:
    """The name of a parameter with NaN or infinite entries, or of a buffer with NaN entries; None if there is none.

    Of what is split over processes, this process looks at its part. A mask in a buffer may well be infinite.

    Args:
        model: the model.
    """
    return _first_bad(model.named_parameters()) or _first_bad(model.named_buffers(), torch.isnan)


def _trained(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


@torch.no_grad()
def _first_bad(tensors: Iterable[tuple[str, Tensor]], bad: Any = None) -> str | None:
    bad = bad or (lambda tensor: ~tensor.isfinite())
    # One byte: there are no such operations on float8, which only stores what is quantised.
    numbers = [(n, local(t)) for n, t in tensors if t.is_floating_point() and t.element_size() > 1 and not t.is_meta]
    flags = [bad(tensor).any() for _, tensor in numbers]
    if not flags or not bool(torch.stack([flag.to(flags[0].device) for flag in flags]).any()):
        return None
    return next(name for (name, _), flag in zip(numbers, flags, strict=True) if flag)
