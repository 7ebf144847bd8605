"""Resolves and checks everything that a run needs before any weight is read, for training and for a dry run alike."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, Trainer, TrainingArguments

from scalora.config import LORA_DEFAULTS, MERGES_INTO_THE_BASE, ScaLoraConfig, default_weight_rate
from scalora.parallel.job import from_first, is_first
from scalora.rivals.method import Method
from scalora.rivals.scalora import ScaLoraMethod
from scalora.runs.claim import check_run_folder
from scalora.runs.data import Examples, examples_of, label_names, tokenized_for_classification, warn_about_unused
from scalora.runs.errors import InputError
from scalora.runs.formats import is_conversational, trl_examples, used_columns
from scalora.runs.losses import CausalTrainer, SequenceTrainer
from scalora.runs.mixing import mixed
from scalora.runs.model_limits import TextLimit, require_trl_tokens, text_limit
from scalora.runs.models import Source, empty_base, hidden_size, load_tokenizer, resolve_source
from scalora.runs.names import listed
from scalora.runs.optimizer_checks import check_optimizer, default_mode, uses_pair_adamw
from scalora.runs.resume import (
    Change,
    check_same_data,
    environment_of,
    is_longer,
    settings_changes,
    training_changes,
)
from scalora.runs.rewards import reward_digest, reward_functions
from scalora.runs.run_folder import SUMMARY_FILE, trainer_folder
from scalora.runs.scores import classification_scores, regression_scores
from scalora.runs.settings import Settings, method_class, run_settings, training_class
from scalora.runs.sharding import check_sharding
from scalora.runs.streams import Stream
from scalora.runs.tasks import LABELLED, RATE_SHARES, WITH_HEAD, needs_reference
from scalora.runs.training_defaults import TRAINING_DEFAULTS
from scalora.runs.trl_trainers import trl_trainer
from scalora.runs.unfinished import how_to_go_on, is_unfinished
from scalora.saving.checkpoints import last_checkpoint


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
        examples: the examples by split, ``"train"`` and perhaps ``"eval"``, as they were loaded; the first of a stream.
        stream: the training data, if they are streamed.
        arguments: the trainer's arguments.
        labels: names of the classes in order; None for other tasks than classification.
        text_limit: where texts are truncated; None for the tasks that TRL trains.
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
    examples: dict[str, Examples]
    stream: Stream | None
    arguments: TrainingArguments
    labels: list[str] | None
    text_limit: TextLimit | None
    make_trainer: partial[Trainer]
    environment: dict[str, Any]
    changes: Mapping[str, Change] = field(default_factory=dict)
    finished: bool = False

    def count(self, split: str) -> int:
        """The number of examples of an epoch; of a stream, of its first examples.

        Args:
            split: ``"train"`` or ``"eval"``.
        """
        if self.stream is not None and split == "train":
            return len(self.examples[split].rows)
        return len(self.make_trainer.keywords[f"{split}_dataset"])


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
    peft_config = peft_config_of(settings, method)
    if not resume and is_first():
        check_run_folder(settings, overwrite=overwrite)
    if resume:
        settings = with_rate(settings, method)  # as the run in the folder has it
    # Here the other processes of a job wait for the first, which has taken the run folder by then.
    arguments = training_arguments(settings, method, evaluates=settings.data.eval is not None)
    check_sharding(settings, method, arguments)
    checkpoint, changes, finished = None, {}, False
    if resume:
        changes = _changes(settings, method, arguments)
        finished = from_first((Path(settings.output_dir) / SUMMARY_FILE).is_file()) and not is_longer(changes)
        checkpoint = None if finished else from_first(_checkpoint(settings))
    source = resolve_source(settings.model)
    stream = Stream(settings.data, settings.task, arguments.seed) if settings.data.streaming else None
    examples = _examples(settings, stream)
    # After the data, whose absence is found out without asking for a model.
    if (rated := with_rate(settings, method)) is not settings:
        settings, arguments.learning_rate = rated, rated.training["learning_rate"]
    environment = environment_of(settings, examples, arguments, streams=stream is not None)
    if (digest := reward_digest(settings.reward)) is not None:
        environment["reward"] = digest
    if resume:
        check_same_data(Path(settings.output_dir), environment)
    if isinstance(method, ScaLoraMethod):
        _require_mergeable_base(settings, method)
    else:
        _warn_about_rescales(settings)
    check_optimizer(settings, method, arguments)
    tokenizer = load_tokenizer(source, settings)
    labels = None
    if settings.task == "classification":
        labels = label_names(*examples["train"], settings.data)
    limit = None
    if settings.task in LABELLED:
        limit = text_limit(settings.data.max_tokens, tokenizer, empty_base(source, settings, tokenizer, labels))
    make_trainer = trainer_maker(settings, tokenizer, examples, arguments, labels, limit, stream)
    for rows, name in examples.values():
        warn_about_unused(rows, name, used_columns(rows, name, settings.data, settings.task))
    return PreparedRun(
        settings=settings,
        method=method,
        peft_config=peft_config,
        checkpoint=checkpoint,
        source=source,
        tokenizer=tokenizer,
        examples=examples,
        stream=stream,
        arguments=arguments,
        labels=labels,
        text_limit=limit,
        make_trainer=make_trainer,
        environment=environment,
        changes=changes,
        finished=finished,
    )


def with_rate(settings: Settings, method: Method) -> Settings:
    """The settings with a learning rate, if they lack one and the optimizer's default depends on the model.

    Args:
        settings: the run's settings.
        method: the fine-tuning method.

    Raises:
        InputError: there is no such model, or no readable config of it.
    """
    if "learning_rate" in settings.training or not uses_pair_adamw(settings, method):
        return settings
    width = hidden_size(resolve_source(settings.model), settings)
    if width is None:
        raise InputError(
            f"model {settings.model!r} has no hidden_size in its config, from which the learning rate would follow: "
            "set training.learning_rate"
        )
    rate = default_weight_rate(width, block_signs=settings.method == "block_signs")
    rate *= RATE_SHARES.get(settings.task, 1.0)
    training = settings.training | {"learning_rate": float(f"{rate:.2g}")}
    return settings.model_copy(update={"training": training})


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
    share = RATE_SHARES.get(settings.task, 1.0)
    if method.learning_rate is not None:
        defaults["learning_rate"] = method.learning_rate * share
    try:
        defaults |= method.training_defaults()
    except ImportError as error:
        raise InputError(f"method={settings.method!r}: {error}") from None
    if settings.task == "sft" and settings.data.text != "text":
        defaults["dataset_text_field"] = settings.data.text
    if settings.task == "grpo":
        defaults["reward_weights"] = settings.reward.weights
    try:
        # Copies, because it changes the dict of fsdp_config.
        return training_class(settings.task)(**defaults | copy.deepcopy(settings.training))
    except (ImportError, TypeError, ValueError) as error:
        raise InputError(f"training arguments: {error}") from None


def trainer_maker(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    examples: dict[str, Examples],
    arguments: TrainingArguments,
    labels: list[str] | None,
    limit: TextLimit | None,
    stream: Stream | None = None,
) -> partial[Trainer]:
    """Check the examples, tokenise those for classification or regression, and return what makes the task's trainer.

    Args:
        settings: the run's settings.
        tokenizer: the model's tokenizer.
        examples: the examples by split, ``"train"`` and perhaps ``"eval"``.
        arguments: the trainer's arguments.
        labels: names of the classes in order; None for other tasks than classification.
        limit: where texts of classification or regression are truncated; None: nowhere.
        stream: trains on this in place of ``examples["train"]``, which are its first examples.

    Raises:
        InputError: an example or the rewards can't be used, or the tokenizer lacks what the examples need.
    """
    if settings.task in LABELLED:
        data = {
            split: tokenized_for_classification(*rows, settings.data, settings.task, tokenizer, labels, limit).examples
            for split, rows in examples.items()
        }
        make: Callable[..., Trainer] = partial(
            SequenceTrainer,
            data_collator=DataCollatorWithPadding(tokenizer),
            head_rate=settings.head_learning_rate,
            compute_metrics=regression_scores if labels is None else classification_scores,
        )
    else:
        data = {split: trl_examples(*rows, settings.data, settings.task) for split, rows in examples.items()}
        for split, rows in data.items():
            require_trl_tokens(tokenizer, settings.task, settings.training, conversations=is_conversational(rows))
            if settings.training.get("completion_only_loss") and "completion" not in rows.column_names:
                raise InputError(
                    f"training.completion_only_loss=True: the examples of data.{split} have no completion, so the loss "
                    "would be on all tokens; for conversations set assistant_only_loss, else leave it out"
                )
        make = CausalTrainer
        if settings.task != "sft":
            rewards = []
            if settings.task == "grpo":
                rewards = reward_functions(settings.reward, data["train"].column_names)
            make = trl_trainer(settings, method_class(settings), rewards)
    if stream is not None:
        train = stream.examples(examples["train"])
    else:
        train = mixed(data["train"], examples["train"].name, settings.data.train, arguments.seed)
    return partial(
        make,
        args=arguments,
        train_dataset=train,
        eval_dataset=data.get("eval"),
        processing_class=tokenizer,
    )


def method_of(settings: Settings) -> Method:
    """The fine-tuning method of a run, with its options.

    Args:
        settings: the run's settings.

    Raises:
        InputError: the options are not the method's, or the task needs the model before training and the method
            changes it.
    """
    cls = method_class(settings)
    options = dict(settings.method_options)
    if issubclass(cls, ScaLoraMethod):
        mode = default_mode(settings)
        options["config"] = ScaLoraConfig.from_dict(({"mode": mode} if mode else {}) | settings.scalora)
    if needs_reference(settings.task, settings.training):
        if cls.before_training == "lost":
            raise InputError(
                f"method {settings.method!r} can't train task {settings.task!r}: the loss compares the model with the "
                "one before training, which the method does not keep; take another method"
            )
        if issubclass(cls, ScaLoraMethod):
            options["config"] = _keeping_the_base(options["config"], settings.task)
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise InputError(f"method_options: {error}") from None


def _keeping_the_base(config: ScaLoraConfig, task: str) -> ScaLoraConfig:
    """The settings where the reference is the model without its adapter: ``auto`` is factored, as in the engine."""
    if config.merge in MERGES_INTO_THE_BASE:
        raise InputError(
            f"scalora.merge={config.merge!r}: it changes the base weights, and task {task!r} compares the model with "
            "them: set it to factored or auto"
        )
    return replace(config, merge="factored")


def peft_config_of(settings: Settings, method: Method) -> PeftConfig | None:
    """The config of a run's adapter; None for methods that train all weights.

    Args:
        settings: the run's settings.
        method: the fine-tuning method.

    Raises:
        InputError: the method's adapter has no such field, or a value is invalid.
    """
    task_type = "SEQ_CLS" if settings.task in WITH_HEAD else "CAUSAL_LM"
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
    found = with_rate(run_settings(Path(settings.output_dir)), method)
    changes = settings_changes(found, settings)
    earlier = training_arguments(found, method, evaluates=settings.data.eval is not None)
    return changes | training_changes(earlier, arguments)


def _checkpoint(settings: Settings) -> Path:
    checkpoint = last_checkpoint(trainer_folder(settings))
    if checkpoint is None:
        run = Path(settings.output_dir)
        why = (
            how_to_go_on(run)
            if is_unfinished(run)
            else "it has come to its end, and there is no checkpoint to go on from"
        )
        raise InputError(f"run {str(run)!r} can't be resumed: {why}")
    return checkpoint


def _examples(settings: Settings, stream: Stream | None) -> dict[str, Examples]:
    if settings.data.train is None:
        raise InputError("data.train is missing: which file should it train on?")
    found = {"train": examples_of(settings.data, settings.data.train, "train") if stream is None else stream.head()}
    if settings.data.eval is not None:
        found["eval"] = examples_of(settings.data, settings.data.eval, "eval")
    return found


def _require_mergeable_base(settings: Settings, method: ScaLoraMethod) -> None:
    if settings.quantization is not None and method.config.merge in MERGES_INTO_THE_BASE:
        raise InputError(
            f"scalora.merge={method.config.merge!r}: can't merge into {settings.quantization} weights; set it to "
            "factored or auto"
        )


def _warn_about_rescales(settings: Settings) -> None:
    """Name settings of rescales in the config of a run without them; not those that a template has."""
    defaults = {field.name: field.default for field in fields(ScaLoraConfig)}
    if set_ := [f"scalora.{key}={value!r}" for key, value in settings.scalora.items() if value != defaults.get(key)]:
        warnings.warn(
            f"{listed(set_)}: ignored, because the method {settings.method!r} has no rescales (the method scalora has)",
            stacklevel=2,
        )
