"""`ScaLoraCallback`: ScaLoRA in `transformers.Trainer` and the trainers built on it (TRL's SFTTrainer and others)."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import get_last_checkpoint

from scalora.config import ScaLoraConfig
from scalora.engine import ScaLora
from scalora.integrations.trainer_needs import config_for_trainer
from scalora.model.adapters import promote_adapters
from scalora.model.attachment import attachment_of
from scalora.model.copies import complete_copies
from scalora.pair_adamw import PairAdamW
from scalora.parallel.data_parallel import keep_out_of_broadcasts
from scalora.parallel.processes import failing_together, process_count
from scalora.saving.attach import fingerprint_of
from scalora.saving.checkpoints import set_broken_checkpoints_aside, why_not_resumable
from scalora.saving.errors import StateError
from scalora.saving.peft_model import state_beside, write_placeholders
from scalora.saving.state import check_base, check_content
from scalora.saving.state_file import holds_state, read_state
from scalora.saving.zero_files import processes_of_zero

_T = TypeVar("_T")


class ScaLoraCallback(TrainerCallback):  # type: ignore[misc]
    """Adds ScaLoRA to a Trainer.

    Examples:
        >>> trainer = SFTTrainer(model, args=args, train_dataset=data, peft_config=peft_config,
        ...                      callbacks=[ScaLoraCallback(ScaLoraConfig())])

    Attaches `ScaLora` when training starts and detaches it at the end. Its metrics are added to every training log, so
    they reach everything in ``report_to``.

    Checkpoints, ``resume_from_checkpoint`` and ``load_best_model_at_end`` work as usual. A checkpoint holds the whole
    state and, with a factored remainder, an ordinary adapter too. With ``resume_from_checkpoint=True``, incomplete
    checkpoints, of a run that was killed while saving, are renamed, and the last complete one is used; a run that has
    taken all its steps takes no more. All this needs the callback to be passed to the Trainer's constructor instead of
    being added later.

    Warns if the settings and the number of steps leave no rescale, and if there was none in the end: such a run is
    plain LoRA.

    Args:
        config: the settings. None: the defaults.
        pair_adamw: whether the Trainer's optimizer is to be `scalora.PairAdamW`, with the Trainer's learning rate,
            betas, epsilon and weight decay. With ``mode="matrix"`` AdamW can't be it.
        make_engine: called with model, optimizer and config when training starts; returns the engine to attach. Other
            functions than `ScaLora` are for control experiments.

    Raises:
        UnsupportedLayerError: when training starts: a module is not supported; the message names it.
        UnsupportedOptimizerError: when training starts: the optimizer's state can't be transported; the message says
            why.
        StateError: when training starts: the checkpoint to resume from is damaged, was written without ScaLoRA or
            with ``save_only_model``, or belongs to another base model, adapter or settings.

    Attributes:
        config: the settings.
        engine: the `ScaLora` of the last training; None before training.
    """

    def __init__(
        self,
        config: ScaLoraConfig | None = None,
        *,
        pair_adamw: bool = False,
        make_engine: Callable[..., ScaLora] = ScaLora,
    ) -> None:
        self.config = config or ScaLoraConfig()
        self._pair_adamw = pair_adamw
        self._make_engine = make_engine
        self.engine: ScaLora | None = None
        self._checkpoint: Path | None = None
        self._resumed_from: Path | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Have the Trainer find complete checkpoints only, and load them through the engine.

        Also converts the adapter back to float32: TRL makes that of a quantised model bfloat16, and a rescale would
        multiply its rounding errors. And completes the copy of a trained adapter that TRL makes for reference.

        Args:
            args: the Trainer's arguments, with the settings of `scalora.PairAdamW`.
            state: the Trainer's state; not used.
            control: the Trainer's control flags; not used.
            kwargs: other arguments of the event, with the model.
        """
        if (trainer := calling(Trainer)) is not None:
            trainer.train = self._training(trainer)
        model: nn.Module = kwargs["model"]
        keep_out_of_broadcasts(model)  # now, because the engine can't reach the wrapper from the model inside it
        if isinstance(model, PeftModel):
            promote_adapters(model)
            complete_copies(model)  # now, because TRL may compute the reference's outputs before it trains
        if self._pair_adamw and trainer is not None:
            have_pair_adamw(trainer)

    def _training(self, trainer: Trainer) -> Callable[..., Any]:
        """The Trainer's `train`, which loads states.

        It sets broken checkpoints aside first if it shall find the one to resume from.
        """
        train = trainer.train

        @wraps(train)
        def with_states(resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
            checkpoint = resume_from_checkpoint
            if checkpoint is True:
                if trainer.is_world_process_zero():
                    set_broken_checkpoints_aside(Path(trainer.args.output_dir))
                trainer.accelerator.wait_for_everyone()
                checkpoint = get_last_checkpoint(trainer.args.output_dir)
            if checkpoint and (flaw := why_not_resumable(Path(checkpoint))) is not None:
                raise StateError(f"can't resume from {str(checkpoint)!r}: {flaw}")
            if checkpoint and trainer.is_deepspeed_enabled:
                _check_count(Path(checkpoint))
            self._resumed_from = Path(checkpoint) if checkpoint else None
            with self._loading_states(trainer):
                return train(resume_from_checkpoint, *args, **kwargs)

        return with_states

    @contextmanager
    def _loading_states(self, trainer: Trainer) -> Iterator[None]:
        """Replaces the `load_adapter` of the Trainer's model, also of one that `model_init` makes, while it trains.

        Afterwards it is PEFT's again, and the model can be pickled.
        """
        changed: list[nn.Module] = []

        def change(model: nn.Module) -> nn.Module:
            if isinstance(model, PeftModel):
                load_adapter = partial(self._load_adapter, model, model.load_adapter)
                object.__setattr__(model, "load_adapter", load_adapter)
                changed.append(model)
            return model

        call_model_init = trainer.call_model_init
        if trainer.model is not None:
            change(trainer.model)
        trainer.call_model_init = lambda *args, **kwargs: change(call_model_init(*args, **kwargs))
        try:
            yield
        finally:
            trainer.call_model_init = call_model_init
            for model in changed:
                vars(model).pop("load_adapter", None)

    def _load_adapter(
        self,
        model: PeftModel,
        load_adapter: Callable[..., Any],
        model_id: str | Path,
        adapter_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Replaces the model's `load_adapter`: loads a ScaLoRA state, now or as soon as the engine is attached.

        The Trainer resumes before the event `on_train_begin`, and loads the best model after it.
        """
        folder = state_beside(model_id, adapter_name) if adapter_name in model.active_adapters else None
        if folder is None:
            return load_adapter(model_id, adapter_name, *args, **kwargs)
        self._checkpoint = folder
        if self.engine is not None:
            self.engine.load(folder)
        else:  # check the base before the Trainer loads the optimizer, whose error would not mention it
            state = read_state(folder)
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
            control: the Trainer's control flags; modified if there is nothing left to train.
            kwargs: other arguments of the event, with the model and the optimizer.

        Raises:
            UnsupportedLayerError: a module is not supported; the message names it.
            UnsupportedOptimizerError: the optimizer's state can't be transported; the message says why.
            StateError: the checkpoint to resume from is damaged, was written without ScaLoRA, or belongs to another
                base model, adapter or settings.
            ChangedBaseError: the trainer's reference is the model without its adapter, whose base would be changed, or
                it sends a server less than the whole update.
            ValueError: its server takes adapters of a lower rank than that of the whole update.
        """
        _move_before_reporters(self)
        model: nn.Module = kwargs["model"]
        optimizer: Optimizer = kwargs["optimizer"]
        config = config_for_trainer(self.config, calling(Trainer), model)
        self.engine = self._make_engine(model, optimizer, config)
        if self.engine.is_sharded:
            self._prepare_shards(args, model)
        if self._checkpoint is not None:
            self.engine.load(self._checkpoint)
            if not self.engine.is_sharded and not (self._checkpoint / "optimizer.pt").exists():
                _load_scheduler(kwargs["lr_scheduler"], self._checkpoint)
        elif state.global_step:
            raise StateError(
                f"training resumes at step {state.global_step}, but no ScaLoRA state was loaded: the checkpoint was "
                "written without ScaLoRA, or ScaLoraCallback was not passed to the Trainer's constructor"
            )
        train_no_further(state, control)
        warn_if_plain_lora(self.config, state.max_steps)

    def _prepare_shards(self, args: TrainingArguments, model: nn.Module) -> None:
        """With shards, the Trainer's own checkpoints have the adapter alone, and it resumes without `load_adapter`."""
        if args.load_best_model_at_end:
            raise StateError(
                "load_best_model_at_end=True would load the best adapter onto the last base weights, because the "
                "Trainer loads the adapter alone with FSDP2 and DeepSpeed: set it to False, and load the best "
                "checkpoint afterwards"
            )
        if (attachment := attachment_of(model)) is not None:
            attachment.saved_by_callback = True
        if self._resumed_from is not None and holds_state(self._resumed_from):
            self._checkpoint = self._resumed_from

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """With FSDP2 and DeepSpeed, write the state into the checkpoint, which takes all processes.

        As shards with FSDP2, unless its ``state_dict_type`` asks for one file. Also the files that a Trainer in one
        process, or with DistributedDataParallel, wants before it goes on from it.

        Args:
            args: the Trainer's arguments.
            state: the Trainer's state.
            control: the Trainer's control flags; not used.
            kwargs: other arguments of the event; not used.
        """
        if self.engine is not None and self.engine.is_sharded:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            with failing_together(OSError):
                if state.is_world_process_zero:
                    write_placeholders(self.engine.pairs[0], folder)
            self.engine.save(folder, sharded=not _saves_one_file())

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
            if (attachment := attachment_of(kwargs["model"])) is not None:
                attachment.saved_by_callback = False


def _check_count(checkpoint: Path) -> None:
    """Check that DeepSpeed can read its part of a checkpoint in this number of processes."""
    saved, now = processes_of_zero(checkpoint), process_count()
    if saved not in (None, now):
        raise StateError(
            f"can't resume from {str(checkpoint)!r} in {now} processes: DeepSpeed has saved its part in {saved}, and "
            f"reads it in as many alone: start {saved} processes, or go on without DeepSpeed in any number"
        )


def _load_scheduler(scheduler: Any, checkpoint: Path) -> None:
    """Restore a scheduler from a checkpoint of shards, of which a Trainer without shards takes the weights alone."""
    path = checkpoint / "scheduler.pt"
    if not path.is_file():
        raise StateError(
            f"can't resume from {str(checkpoint)!r} without DeepSpeed, whose own scheduler it was written with: leave "
            "'scheduler' out of DeepSpeed's config, or resume with DeepSpeed"
        )
    saved, own = torch.load(path, weights_only=True), scheduler.state_dict()
    trained = [any(p.requires_grad for p in group["params"]) for group in scheduler.optimizer.param_groups]
    for key, values in saved.items():
        # DeepSpeed drops groups without parameters.
        if isinstance(values, list) and len(values) == sum(trained) < len(trained):
            rest = iter(values)
            saved[key] = [next(rest) if of_group else one for of_group, one in zip(trained, own[key], strict=True)]
    scheduler.load_state_dict(saved)


def warn_if_plain_lora(config: ScaLoraConfig, steps: int) -> None:
    """Warn, before it trains, if a run is too short to rescale even once.

    Args:
        config: the settings.
        steps: number of optimizer steps of the run.
    """
    first = config.first_rescale
    if steps < first:
        warnings.warn(
            f"this run of {steps} steps never rescales, so it is plain LoRA: with warmup_steps={config.warmup_steps} "
            f"and interval={config.interval} the first rescale is at step {first}; lower them, or train for longer",
            stacklevel=3,
        )


def train_no_further(state: TrainerState, control: TrainerControl) -> None:
    """During ``on_train_begin``: end a training that resumes at its last step, where the Trainer would take one more.

    Args:
        state: the Trainer's state, with the step that training resumes at.
        control: the Trainer's control flags; modified.
    """
    trainer = calling(Trainer)
    if trainer is None:
        return
    vars(trainer).pop("_run_epoch", None)  # of an earlier training that had no epoch to begin
    if not 0 < state.max_steps <= state.global_step:
        return
    control.should_training_stop = True
    # The Trainer looks at that flag only after a step, and has no public way to take none (checked with 5.23).
    trainer._run_epoch = lambda **_: None


def _saves_one_file() -> bool:
    """Whether the Trainer is set to save whole weights of a model that FSDP has sharded."""
    trainer = calling(Trainer)
    plugin = None if trainer is None else getattr(trainer.accelerator.state, "fsdp_plugin", None)
    return str(getattr(plugin, "state_dict_type", "")).endswith("FULL_STATE_DICT")


def _move_before_reporters(callback: TrainerCallback) -> None:
    """Move a callback to the front of the Trainer's list of callbacks, during an event.

    Reporting callbacks (TensorBoard, W&B, …) are before the user's in this list, and would report the logs before the
    metrics are added.
    """
    if (handler := calling(CallbackHandler)) is not None:
        handler.callbacks.remove(callback)
        handler.callbacks.insert(0, callback)


def have_pair_adamw(trainer: Trainer) -> None:
    """Have a Trainer create `scalora.PairAdamW`, with its arguments, for the model that it has when it trains.

    Args:
        trainer: the Trainer.

    Raises:
        ValueError: it was given an optimizer.
    """
    if trainer.optimizer is not None:
        raise ValueError(
            f"pair_adamw=True makes the optimizer, but the Trainer was given {type(trainer.optimizer).__name__} in "
            "optimizers: leave one of them out"
        )
    create_optimizer = trainer.create_optimizer

    @wraps(create_optimizer)
    def create_pair_adamw(*args: Any, **kwargs: Any) -> Optimizer:
        settings = {"model": trainer.model, **adamw_arguments(trainer.args)}  # of which the Trainer takes the model out
        trainer.optimizer_cls_and_kwargs = (PairAdamW, settings)
        optimizer: Optimizer = create_optimizer(*args, **kwargs)
        return optimizer

    trainer.create_optimizer = create_pair_adamw


def adamw_arguments(arguments: TrainingArguments) -> dict[str, Any]:
    """The keyword arguments that a Trainer passes to AdamW, for methods that create their own optimizer.

    Args:
        arguments: the training arguments.
    """
    return {
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
        "weight_decay": arguments.weight_decay,
    }


def calling(kind: type[_T]) -> _T | None:
    """The object of a class whose method, directly or not, called this; None if there is none.

    The Trainer passes neither itself nor its list of callbacks to them, so they are taken from the callers' frames.

    Args:
        kind: the class.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(owner := frame.f_locals.get("self"), kind):
            return owner
        frame = frame.f_back
    return None
