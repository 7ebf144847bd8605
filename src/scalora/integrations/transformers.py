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
    """Adds ScaLoRA to a Trainer.

    Example:
        >>> trainer = SFTTrainer(model, args=args, train_dataset=data, peft_config=peft_config,
        ...                      callbacks=[ScaLoraCallback(ScaLoraConfig())])

    Attaches `ScaLora` when training starts and detaches it at the end. Its metrics are added to every training log, so
    they reach everything in ``report_to``.

    Checkpoints, ``resume_from_checkpoint`` and ``load_best_model_at_end`` work as usual. A checkpoint holds the whole
    state and, with a factored remainder, an ordinary adapter too. Incomplete checkpoints, of a run that was killed
    while saving, are renamed when the Trainer is created: ``resume_from_checkpoint=True`` then finds the last complete
    one. All this needs the callback to be passed to the Trainer's constructor instead of being added later.

    Args:
        config: the settings. None: the defaults.
        make_engine: called with model, optimizer and config when training starts; returns the engine to attach. Other
            functions than `ScaLora` are for control experiments.

    Raises:
        UnsupportedLayerError: when training starts: a module is not supported; the message names it.
        UnsupportedOptimizerError: when training starts: the optimizer's state can't be transported; the message says
            why.
        StateError: when training starts: the checkpoint to resume from is damaged, was written without ScaLoRA, or
            belongs to another base model, adapter or settings.

    Attributes:
        config: the settings.
        engine: the `ScaLora` of the last training; None before training.
    """

    def __init__(self, config: ScaLoraConfig | None = None, *, make_engine: Callable[..., ScaLora] = ScaLora) -> None:
        self.config = config or ScaLoraConfig()
        self._make_engine = make_engine
        self.engine: ScaLora | None = None
        self._checkpoint: Path | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Rename incomplete checkpoints, and have the Trainer load complete ones through the engine.

        Also converts the adapter back to float32: TRL makes that of a quantised model bfloat16, and a rescale would
        multiply its rounding errors.

        Args:
            args: the Trainer's arguments.
            state: the Trainer's state; not used.
            control: the Trainer's control flags; not used.
            kwargs: other arguments of the event, with the model.
        """
        set_broken_checkpoints_aside(Path(args.output_dir))
        model: nn.Module = kwargs["model"]
        keep_out_of_broadcasts(model)  # now, because the engine can't reach the wrapper from the model inside it
        if isinstance(model, PeftModel):
            promote_adapters(model)
            load_adapter = partial(self._load_adapter, model, model.load_adapter)
            object.__setattr__(model, "load_adapter", load_adapter)

    def _load_adapter(
        self, model: PeftModel, load_adapter: Callable[..., Any], model_id: str | Path, *args: Any, **kwargs: Any
    ) -> Any:
        """Replaces the model's `load_adapter`: loads a ScaLoRA state, now or as soon as the engine is attached.

        The Trainer resumes before the event `on_train_begin`, and loads the best model after it.
        """
        if not (Path(model_id) / STATE_FILE).is_file():
            return load_adapter(model_id, *args, **kwargs)
        self._checkpoint = Path(model_id)
        if self.engine is not None:
            self.engine.load(model_id)
        else:  # check the base before the Trainer loads the optimizer, whose error would not mention it
            state = read_state(self._checkpoint)
            check_content(state)
            check_base(state, fingerprint_of(model))
        return None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach the engine to the Trainer's model and optimizer, and load the checkpoint to resume from.

        Args:
            args: the Trainer's arguments; not used.
            state: the Trainer's state.
            control: the Trainer's control flags; not used.
            kwargs: other arguments of the event, with the model and the optimizer.

        Raises:
            UnsupportedLayerError: a module is not supported; the message names it.
            UnsupportedOptimizerError: the optimizer's state can't be transported; the message says why.
            StateError: the checkpoint to resume from is damaged, was written without ScaLoRA, or belongs to another
                base model, adapter or settings.
        """
        _move_before_reporters(self)
        model: nn.Module = kwargs["model"]
        optimizer: Optimizer = kwargs["optimizer"]
        self.engine = self._make_engine(model, optimizer, self.config)
        if self._checkpoint is not None:
            self.engine.load(self._checkpoint)
        elif state.global_step:
            raise StateError(
                f"training resumes at step {state.global_step}, but no ScaLoRA state was loaded: the checkpoint was "
                "written without ScaLoRA, or ScaLoraCallback was not passed to the Trainer's constructor"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the metrics to a training log; the logs of evaluations stay as they are.

        Args:
            args: the Trainer's arguments; not used.
            state: the Trainer's state, to whose last log entry the metrics are added too.
            control: the Trainer's control flags; not used.
            logs: what is logged; modified.
            kwargs: other arguments of the event; not used.
        """
        if self.engine is None or logs is None or "loss" not in logs:
            return
        metrics = self.engine.metrics()
        logs.update(metrics)
        state.log_history[-1].update(metrics)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach the engine. The next training attaches a new one.

        Args:
            args: the Trainer's arguments; not used.
            state: the Trainer's state; not used.
            control: the Trainer's control flags; not used.
            kwargs: other arguments of the event; not used.
        """
        self._checkpoint = None
        if self.engine is not None:
            self.engine.detach()


def _move_before_reporters(callback: TrainerCallback) -> None:
    """Move a callback to the front of the Trainer's list of callbacks, during an event.

    Reporting callbacks (TensorBoard, W&B, …) are before the user's in this list, and would report the logs before the
    metrics are added. The Trainer does not pass the list to its callbacks, so it is taken from the caller's frame.
    """
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    if frame is not None:
        callbacks = frame.f_locals["self"].callbacks
        callbacks.remove(callback)
        callbacks.insert(0, callback)
