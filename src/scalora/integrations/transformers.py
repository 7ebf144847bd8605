"""`ScaLoraCallback`: ScaLoRA in `transformers.Trainer` and the trainers built on it (TRL's SFTTrainer and others)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from scalora.config import ScaLoraConfig
from scalora.engine import ScaLora
from scalora.model.adapters import promote_adapters
from scalora.parallel.data_parallel import keep_out_of_broadcasts
from scalora.saving.attach import fingerprint_of
from scalora.saving.checkpoints import set_broken_checkpoints_aside
from scalora.saving.errors import StateError
from scalora.saving.state import check_base, check_content
from scalora.saving.state_file import STATE_FILE, read_state


class ScaLoraCallback(TrainerCallback):  # type: ignore[misc]
    """Trains with ScaLoRA in a Trainer that is otherwise unchanged.

    Example:
        >>> trainer = SFTTrainer(model, args=args, train_dataset=data, peft_config=peft_config,
        ...                      callbacks=[ScaLoraCallback(ScaLoraConfig())])

    Attaches at the start of training and adds the engine's metrics to every training log, so that they reach whatever
    ``report_to`` names. Detaches at the end.

    Checkpoints, ``resume_from_checkpoint`` and ``load_best_model_at_end`` work as ever: a checkpoint holds the whole
    state (and with a factored remainder an ordinary adapter too). One that was cut off while it was written is set
    aside when the Trainer is made, so that ``resume_from_checkpoint=True`` finds the last whole one. For both the
    callback must be given to the Trainer's constructor, not added later.

    Args:
        config: settings; the defaults when None.
        make_engine: called with model, optimizer and config at the start of training; `ScaLora`, except in a control
            experiment.

    Raises:
        StateError: at the start of training, when the checkpoint to resume from does not fit; and whatever `ScaLora`
            raises.

    Attributes:
        engine: the attached `ScaLora`; None before training.
    """

    def __init__(self, config: ScaLoraConfig | None = None, *, make_engine: Callable[..., ScaLora] = ScaLora) -> None:
        self.config = config or ScaLoraConfig()
        self._make_engine = make_engine
        self.engine: ScaLora | None = None
        self._checkpoint: Path | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Set broken checkpoints aside, and see to it that the Trainer loads whole ones through the engine.

        TRL makes the adapter of a quantised model bfloat16, whose rounding a rescale would multiply: it is made float32
        again.
        """
        set_broken_checkpoints_aside(Path(args.output_dir))
        model: nn.Module = kwargs["model"]
        keep_out_of_broadcasts(model)  # before the Trainer wraps the model, to which the engine has no way from inside
        if isinstance(model, PeftModel):
            promote_adapters(model)
            load_adapter = partial(self._load_adapter, model, model.load_adapter)
            object.__setattr__(model, "load_adapter", load_adapter)

    def _load_adapter(
        self, model: PeftModel, load_adapter: Callable[..., Any], model_id: str | Path, *args: Any, **kwargs: Any
    ) -> Any:
        """What a model's `load_adapter` does for a ScaLoRA state: bring it back, now or as soon as the engine is there.

        The Trainer resumes before its callbacks see the beginning of training, and loads the best model after it.
        """
        if not (Path(model_id) / STATE_FILE).is_file():
            return load_adapter(model_id, *args, **kwargs)
        self._checkpoint = Path(model_id)
        if self.engine is not None:
            self.engine.load(model_id)
        else:  # before the Trainer loads the optimizer, whose error would not name the base
            state = read_state(self._checkpoint)
            check_content(state)
            check_base(state, fingerprint_of(model))
        return None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the model and optimizer that the Trainer has built."""
        _move_before_reporters(self)
        model: nn.Module = kwargs["model"]
        optimizer: Optimizer = kwargs["optimizer"]
        self.engine = self._make_engine(model, optimizer, self.config)
        if self._checkpoint is not None:
            self.engine.load(self._checkpoint)
        elif state.global_step:
            raise StateError(
                f"training resumes at step {state.global_step}, but no ScaLoRA state was loaded: the checkpoint was "
                "written without ScaLoRA, or the callback was not given to the Trainer's constructor"
            )

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
        self._checkpoint = None
        if self.engine is not None:
            self.engine.detach()


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
