"""Resolves and checks everything that a run needs before any weight is read, for training and for a dry run alike."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, Trainer, TrainingArguments

from scalora.config import DEFAULT_WEIGHT_RATE, LORA_DEFAULTS, MERGES_INTO_THE_BASE, ScaLoraConfig
from scalora.parallel.job import from_first, is_first
from scalora.rivals.method import Method
from scalora.rivals.scalora import ScaLoraMethod
from scalora.runs.claim import check_run_folder
from scalora.runs.data import (
    is_conversational,
    label_names,
    load_examples,
    sft_examples,
    tokenized_for_classification,
    used_columns,
    warn_about_unused,
)
from scalora.runs.errors import InputError
from scalora.runs.losses import CausalTrainer, SequenceTrainer
from scalora.runs.model_limits import TextLimit, require_sft_tokens, text_limit
from scalora.runs.models import Source, empty_base, load_tokenizer, resolve_source
from scalora.runs.optimizer_checks import check_optimizer, uses_pair_adamw
from scalora.runs.resume import (
    Change,
    check_same_data,
    environment_of,
    is_longer,
    settings_changes,
    training_changes,
)
from scalora.runs.run_folder import SUMMARY_FILE, trainer_folder
from scalora.runs.scores import classification_scores, regression_scores
from scalora.runs.settings import Settings, method_class, run_settings, training_class
from scalora.runs.sharding import check_sharding
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
        peft_config: the config of the adapter, or of the one whose matrices are trained in full; None for methods that
            train all weights.
        checkpoint: checkpoint to resume from; None for a run from the start.
        source: where the base model is.
        tokenizer: the base model's tokenizer.
        examples: the examples by split, ``"train"`` and perhaps ``"eval"``, as they were loaded.
        arguments: the trainer's arguments.
        labels: names of the classes in order; None for other tasks than classification.
        text_limit: where texts are truncated; None for sft.
        make_trainer: makes the trainer of a model.
        environment: where, with what and on what the run trains, for ``environment.json``.
        changes: what a resumed run does differently, by dotted keys.
        finished: whether the run to resume has nothing left to do.
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
    text_limit: TextLimit | None
    make_trainer: MakeTrainer
    environment: dict[str, Any]
    changes: Mapping[str, Change] = field(default_factory=dict)
    finished: bool = False


def prepare(settings: Settings, *, overwrite: bool = False, resume: bool = False) -> PreparedRun:
    """Resolve and check everything about a run except its weights; writes nothing.

    Args:
        settings: the run's settings.
        overwrite: whether the run may replace an earlier run's folder.
        resume: whether to resume the run in the folder from its last whole checkpoint.

    Raises:
        InputError: something in the config, the data or the run folder can't be used.
    """
    method = method_of(settings)
    peft_config = _peft_config(settings, method)
    if not resume and is_first():
        check_run_folder(settings, overwrite=overwrite)
    # Here the other processes of a job wait for the first, which has taken the run folder by then.
    arguments = training_arguments(settings, method, evaluates=settings.data.eval is not None)
    check_sharding(settings, method, arguments)
    checkpoint, changes, finished = None, {}, False
    if resume:
        changes = _changes(settings, method, arguments)
        finished = from_first((Path(settings.output_dir) / SUMMARY_FILE).is_file()) and not is_longer(changes)
        checkpoint = None if finished else from_first(_checkpoint(settings))
    source = resolve_source(settings.model)
    examples = _examples(settings)
    environment = environment_of(settings, examples, arguments)
    if resume:
        check_same_data(Path(settings.output_dir), environment)
    if isinstance(method, ScaLoraMethod):
        _require_mergeable_base(settings, method)
    check_optimizer(settings, method, arguments)
    tokenizer = load_tokenizer(source, settings)
    labels = None
    if settings.task == "classification":
        labels = label_names(examples["train"], str(settings.data.train), settings.data)
    limit = None
    if settings.task != "sft":
        limit = text_limit(settings.data.max_tokens, tokenizer, empty_base(source, settings, tokenizer, labels))
    make_trainer = trainer_maker(settings, tokenizer, examples, arguments, labels, limit)
    for split, rows in examples.items():
        name = str(getattr(settings.data, split))
        warn_about_unused(rows, name, used_columns(rows, name, settings.data, settings.task))
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
        text_limit=limit,
        make_trainer=make_trainer,
        environment=environment,
        changes=changes,
        finished=finished,
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
    if uses_pair_adamw(settings, method):
        defaults["learning_rate"] = DEFAULT_WEIGHT_RATE
    elif method.learning_rate is not None:
        defaults["learning_rate"] = method.learning_rate
    try:
        defaults |= method.training_defaults()
    except ImportError as error:
        raise InputError(f"method={settings.method!r}: {error}") from None
    if settings.task == "sft" and settings.data.text != "text":
        defaults["dataset_text_field"] = settings.data.text
    try:
        # Copies, because it changes the dict of fsdp_config.
        return training_class(settings.task)(**defaults | copy.deepcopy(settings.training))
    except (ImportError, TypeError, ValueError) as error:
        raise InputError(f"training arguments: {error}") from None


def trainer_maker(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    examples: dict[str, Dataset],
    arguments: TrainingArguments,
    labels: list[str] | None,
    limit: TextLimit | None,
) -> MakeTrainer:
    """Check the examples, tokenise those for classification or regression, and return what makes the task's trainer.

    Args:
        settings: the run's settings.
        tokenizer: the model's tokenizer.
        examples: the examples by split, ``"train"`` and perhaps ``"eval"``.
        arguments: the trainer's arguments.
        labels: names of the classes in order; None for other tasks than classification.
        limit: where texts of classification or regression are truncated; None: nowhere.

    Raises:
        InputError: an example can't be used, or for sft the tokenizer lacks what the examples need.
    """
    if settings.task == "sft":
        data = {
            split: sft_examples(rows, str(getattr(settings.data, split)), settings.data)
            for split, rows in examples.items()
        }
        for rows in data.values():
            require_sft_tokens(tokenizer, settings.training, conversations=is_conversational(rows))
        make: MakeTrainer = CausalTrainer
    else:
        data = {
            split: tokenized_for_classification(
                rows, str(getattr(settings.data, split)), settings.data, settings.task, tokenizer, labels, limit
            ).examples
            for split, rows in examples.items()
        }
        make = partial(
            SequenceTrainer,
            data_collator=DataCollatorWithPadding(tokenizer),
            head_rate=settings.head_learning_rate,
            compute_metrics=regression_scores if labels is None else classification_scores,
        )
    return partial(
        make,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data.get("eval"),
        processing_class=tokenizer,
    )


def method_of(settings: Settings) -> Method:
    """The fine-tuning method of a run, with its options.

    Args:
        settings: the run's settings.

    Raises:
        InputError: the options are not the method's.
    """
    cls = method_class(settings)
    options = dict(settings.method_options)
    if issubclass(cls, ScaLoraMethod):
        mode = {"mode": "matrix"} if settings.optimizer == "pair_adamw" else {}
        options["config"] = ScaLoraConfig.from_dict(mode | settings.scalora)
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


def _changes(settings: Settings, method: Method, arguments: TrainingArguments) -> dict[str, Change]:
    """What the run would do differently from the run in its folder, which must be nothing of consequence."""
    if method.cannot_resume is not None:
        raise InputError(f"method {settings.method!r} can't resume: {method.cannot_resume}; train with --overwrite")
    found = run_settings(Path(settings.output_dir))
    changes = settings_changes(found, settings)
    earlier = training_arguments(found, method, evaluates=settings.data.eval is not None)
    return changes | training_changes(earlier, arguments)


def _checkpoint(settings: Settings) -> Path:
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
    if settings.quantization is not None and method.config.merge in MERGES_INTO_THE_BASE:
        raise InputError(
            f"scalora.merge={method.config.merge!r}: can't merge into {settings.quantization} weights; set it to "
            "factored or auto"
        )
