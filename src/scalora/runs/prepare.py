"""Resolves and checks everything that a run needs before any weight is read, for training and for a dry run alike."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, Trainer, TrainingArguments
from trl import SFTTrainer

from scalora.config import LORA_DEFAULTS, ScaLoraConfig
from scalora.rescale.optimizers import state_degrees
from scalora.rivals.method import Method
from scalora.rivals.scalora import ScaLoraMethod
from scalora.runs.data import label_names, load_examples, sft_examples, tokenized_for_classification
from scalora.runs.errors import InputError
from scalora.runs.models import Source, load_tokenizer, resolve_source
from scalora.runs.run_folder import check_resumable, check_run_folder, trainer_folder
from scalora.runs.scores import classification_scores, regression_scores
from scalora.runs.settings import Settings, method_class, training_class
from scalora.runs.training_defaults import TRAINING_DEFAULTS
from scalora.saving.checkpoints import last_checkpoint


class MakeTrainer(Protocol):
    """Makes a trainer over a run's data."""

    def __call__(self, model: nn.Module, **options: Any) -> Trainer:
        """Make a trainer.

        Args:
            model: the model to train.
            **options: further arguments of the trainer's class, such as ``callbacks``.
        """


@dataclass(frozen=True)
class PreparedRun:
    """A run that was found to be possible, as far as that can be found without weights.

    Attributes:
        settings: the run's settings.
        method: the fine-tuning method, with its options.
        peft_config: the adapter's config; None for methods without an adapter.
        checkpoint: checkpoint to resume from; None for a run from the start.
        source: where the base model is.
        tokenizer: the base model's tokenizer.
        examples: the examples by split, ``"train"`` and perhaps ``"eval"``, as they were loaded.
        arguments: the trainer's arguments.
        labels: names of the classes in order; None for other tasks than classification.
        make_trainer: makes the trainer of a model.
    """

    settings: Settings
    method: Method
    peft_config: PeftConfig | None
    checkpoint: Path | None
    source: Source
    tokenizer: PreTrainedTokenizerBase
    examples: dict[str, Dataset]
    arguments: TrainingArguments
    labels: list[str] | None
    make_trainer: MakeTrainer


def prepare(settings: Settings, *, overwrite: bool = False, resume: bool = False) -> PreparedRun:
    """Resolve and check everything about a run except its weights; writes nothing.

    Args:
        settings: the run's settings.
        overwrite: whether the run may replace an earlier run's folder.
        resume: whether to resume the run in the folder from its last whole checkpoint.

    Raises:
        InputError: something in the config, the data or the run folder can't be used.
    """
    method = _method(settings)
    peft_config = _peft_config(settings, method)
    checkpoint = None
    if resume:
        checkpoint = _checkpoint(settings, method)
    else:
        check_run_folder(settings, overwrite=overwrite)
    source = resolve_source(settings.model)
    examples = _examples(settings)
    arguments = training_arguments(settings, method, evaluates="eval" in examples)
    if isinstance(method, ScaLoraMethod):
        _require_mergeable_base(settings, method)
        _require_supported_optimizer(arguments)
    tokenizer = load_tokenizer(source, settings)
    labels = None
    if settings.task == "classification":
        labels = label_names(examples["train"], str(settings.data.train), settings.data)
    return PreparedRun(
        settings=settings,
        method=method,
        peft_config=peft_config,
        checkpoint=checkpoint,
        source=source,
        tokenizer=tokenizer,
        examples=examples,
        arguments=arguments,
        labels=labels,
        make_trainer=trainer_maker(settings, tokenizer, examples, arguments, labels),
    )


def training_arguments(settings: Settings, method: Method, *, evaluates: bool) -> TrainingArguments:
    """The trainer's arguments: the user's, then our defaults, then the library's.

    Args:
        settings: the run's settings.
        method: the fine-tuning method, which may have defaults of its own.
        evaluates: whether there are examples for evaluation.

    Raises:
        InputError: the library refuses a value.
    """
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    defaults = TRAINING_DEFAULTS | {
        "output_dir": str(trainer_folder(settings)),
        "eval_strategy": "epoch" if evaluates else "no",
        "bf16": bf16,  # TRL's True would make a CPU run bfloat16
        "dataloader_pin_memory": torch.cuda.is_available(),  # it only warns without an accelerator
    }
    if method.learning_rate is not None:
        defaults["learning_rate"] = method.learning_rate
    try:
        defaults |= method.training_defaults()
    except ImportError as error:
        raise InputError(f"method={settings.method!r}: {error}") from None
    if settings.task == "sft" and settings.data.text != "text":
        defaults["dataset_text_field"] = settings.data.text
    try:
        return training_class(settings.task)(**defaults | settings.training)
    except (TypeError, ValueError) as error:
        raise InputError(f"training arguments: {error}") from None


def trainer_maker(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    examples: dict[str, Dataset],
    arguments: TrainingArguments,
    labels: list[str] | None,
) -> MakeTrainer:
    """Check the examples, tokenise those for classification or regression, and return what makes the task's trainer.

    Args:
        settings: the run's settings.
        tokenizer: the model's tokenizer.
        examples: the examples by split, ``"train"`` and perhaps ``"eval"``.
        arguments: the trainer's arguments.
        labels: names of the classes in order; None for other tasks than classification.

    Raises:
        InputError: an example can't be used.
    """
    if settings.task == "sft":
        data = {
            split: sft_examples(rows, str(getattr(settings.data, split)), settings.data)
            for split, rows in examples.items()
        }
        make: MakeTrainer = SFTTrainer
    else:
        data = {
            split: tokenized_for_classification(
                rows, str(getattr(settings.data, split)), settings.data, settings.task, tokenizer, labels
            )
            for split, rows in examples.items()
        }
        make = partial(
            Trainer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=regression_scores if labels is None else classification_scores,
        )
    return partial(
        make,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data.get("eval"),
        processing_class=tokenizer,
    )


def _method(settings: Settings) -> Method:
    cls = method_class(settings)
    options = dict(settings.method_options)
    if issubclass(cls, ScaLoraMethod):
        options["config"] = ScaLoraConfig.from_dict(settings.scalora)
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise InputError(f"method_options: {error}") from None


def _peft_config(settings: Settings, method: Method) -> PeftConfig | None:
    task_type = "CAUSAL_LM" if settings.task == "sft" else "SEQ_CLS"
    try:
        config = method.peft_config({"task_type": task_type, **LORA_DEFAULTS, **settings.lora})
    except (TypeError, ValueError) as error:
        raise InputError(f"lora: {error}") from None
    # PEFT itself looks at the rank only when it builds the layers, after the model has been loaded.
    if config is not None and (not isinstance(config.r, int) or config.r < 1):
        raise InputError(f"lora.r={config.r!r}: the rank must be an integer of at least 1")
    return config


def _checkpoint(settings: Settings, method: Method) -> Path:
    if method.cannot_resume is not None:
        raise InputError(f"method {settings.method!r} can't resume: {method.cannot_resume}; train with --overwrite")
    check_resumable(settings)
    checkpoint = last_checkpoint(trainer_folder(settings))
    if checkpoint is None:
        raise InputError(f"there is no whole checkpoint in {str(trainer_folder(settings))!r} to resume from")
    return checkpoint


def _examples(settings: Settings) -> dict[str, Dataset]:
    if settings.data.train is None:
        raise InputError("data.train is missing: which file should it train on?")
    names = {"train": settings.data.train, "eval": settings.data.eval}
    return {split: load_examples(name, split) for split, name in names.items() if name is not None}


def _require_mergeable_base(settings: Settings, method: ScaLoraMethod) -> None:
    if settings.quantization is not None and method.config.merge == "dense":
        raise InputError(
            f"scalora.merge='dense': can't merge into {settings.quantization} weights; set it to factored or auto"
        )


def _require_supported_optimizer(arguments: TrainingArguments) -> None:
    """Build the Trainer's optimizer over one small parameter, so that a refusal comes before the model is loaded."""
    try:
        cls, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments)
        group = {"params": [torch.nn.Parameter(torch.zeros(1, 1))], "weight_decay": arguments.weight_decay}
        optimizer = cls([group], **keywords)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"training.optim={getattr(arguments.optim, 'value', arguments.optim)!r}: {error}") from None
    state_degrees(optimizer)
