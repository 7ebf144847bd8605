"""`ScaLoraCallback`: ScaLoRA in `transformers.Trainer` and the trainers built on it (TRL's SFTTrainer and others)."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from scalora.config import ScaLoraConfig
from scalora.engine import ScaLora


class ScaLoraCallback(TrainerCallback):  # type: ignore[misc]
    """Trains with ScaLoRA in a Trainer that is otherwise unchanged.

    Example:
        >>> trainer = SFTTrainer(model, args=args, train_dataset=data, peft_config=peft_config,
        ...                      callbacks=[ScaLoraCallback(ScaLoraConfig())])

    Attaches at the start of training and adds the engine's metrics to every training log, so that they reach whatever
    ``report_to`` names. Detaches at the end. Trainer checkpoints would hold the adapter alone, which no longer fits the
    base, so they are switched off with a warning.

    Args:
        config: settings; the defaults when None.

    Raises:
        ValueError: at the start of training, when ``load_best_model_at_end`` needs the checkpoints; and whatever
            `ScaLora` raises.

    Attributes:
        engine: the attached `ScaLora`; None before training.
    """

    def __init__(self, config: ScaLoraConfig | None = None) -> None:
        self.config = config or ScaLoraConfig()
        self.engine: ScaLora | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the model and optimizer that the Trainer has built."""
        _switch_checkpoints_off(args)
        _move_before_reporters(self)
        model: nn.Module = kwargs["model"]
        optimizer: Optimizer = kwargs["optimizer"]
        self.engine = ScaLora(model, optimizer, self.config)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the metrics to a training log (not to an evaluation's)."""
        if self.engine is None or logs is None or "loss" not in logs:
            return
        metrics = self.engine.metrics()
        logs.update(metrics)
        state.log_history[-1].update(metrics)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach: training again attaches anew."""
        if self.engine is not None:
            self.engine.detach()


def _switch_checkpoints_off(args: TrainingArguments) -> None:
    if args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end=True needs Trainer checkpoints, which hold the adapter alone and would be wrong "
            "after ScaLoRA's merges: set it to False"
        )
    if args.save_strategy != "no":
        warnings.warn(
            f"save_strategy={getattr(args.save_strategy, 'value', args.save_strategy)!r} is switched off: a Trainer "
            "checkpoint holds the adapter alone, which no longer fits the base after ScaLoRA's merges. Save "
            "trainer.model.merge_and_unload() when training is over.",
            stacklevel=2,
        )
        args.save_strategy = type(args.save_strategy)("no")


def _move_before_reporters(callback: TrainerCallback) -> None:
    """Put a callback first in the list that is calling it.

    Reporting callbacks (TensorBoard, W&B, …) stand before the user's in the Trainer's list and would report the logs
    before the metrics are added. A Trainer hands its callback list to no callback, so it is taken from the caller.
    """
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    if frame is not None:
        callbacks = frame.f_locals["self"].callbacks
        callbacks.remove(callback)
        callbacks.insert(0, callback)
