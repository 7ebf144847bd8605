"""``scalora train``: from a config to a run folder, through TRL's and Transformers' trainers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl import SFTTrainer

from scalora.rescale import native
from scalora.model.adapters import find_lora_pairs
from scalora.saving.attach import attach, state_of
from scalora.runs.data import label_names, load_examples, sft_examples, tokenized_for_classification
from scalora.runs.errors import InputError
from scalora.runs.measure import StepClock, UpdateSpectra, costs
from scalora.runs.models import (
    load_base,
    load_tokenizer,
    resolve_source,
    save_tokenizer,
)
from scalora.runs.run_folder import (
    MetricsFile,
    check_resumable,
    check_run_folder,
    create_run_folder,
    trainer_folder,
    write_json,
)
from scalora.runs.scores import classification_scores, regression_scores
from scalora.runs.settings import Settings, method_class, training_class
from scalora.config import LORA_DEFAULTS, ScaLoraConfig
from scalora.saving.checkpoints import last_checkpoint
from scalora.saving.ordinary_adapter import write_adapter
from scalora.rescale.remainder import FactoredRemainder
from scalora.rivals.method import Method
from scalora.rivals.scalora import ScaLoraMethod
from scalora.saving.state_file import STATE_FILE, write_state
from scalora.rescale.optimizers import state_degrees
from scalora.saving.files import atomic_folder

# Whose gradients a start that needs them is made from (LoRA-GA's paper samples about as many): with fewer the noise of
# a batch shows, more take as long as training steps.
GRADIENT_BATCHES = 8

MakeTrainer = Callable[..., Trainer]


def train(settings: Settings, *, overwrite: bool = False, resume: bool = False) -> Path:
    """Train and write the run folder; returns its path.

    Args:
        settings: of the run.
        overwrite: replace an earlier run's folder.
        resume: go on from its last whole checkpoint instead.

    Raises:
        InputError: something in the config, the data or the model can't be used. Before training, so nothing is lost.
    """
    method = _method(settings)
    peft_config = _peft_config(settings, method)
    checkpoint = None
    if resume:
        if method.cannot_resume is not None:
            raise InputError(f"method {settings.method!r} can't resume: {method.cannot_resume}; train with --overwrite")
        check_resumable(settings)
        checkpoint = last_checkpoint(trainer_folder(settings))
        if checkpoint is None:
            raise InputError(f"there is no whole checkpoint in {str(trainer_folder(settings))!r} to resume from")
    else:
        check_run_folder(settings, overwrite=overwrite)
    source = resolve_source(settings.model)
    if settings.data.train is None:
        raise InputError("data.train is missing: which file should it train on?")
    examples = {
        split: load_examples(name, split)
        for split, name in (("train", settings.data.train), ("eval", settings.data.eval))
        if name is not None
    }
    arguments = training_arguments(settings, method, evaluates="eval" in examples)
    if isinstance(method, ScaLoraMethod):
        _require_supported_optimizer(arguments)
        if method.config.native and arguments.device.type == "cpu":
            native.build()  # likewise before the model is loaded
    tokenizer = load_tokenizer(source, settings)
    # The Trainer seeds itself only once it has the model, whose new head and adapter are random too.
    set_seed(arguments.seed)
    labels = None
    if settings.task == "classification":
        labels = label_names(examples["train"], str(settings.data.train), settings.data)
    make = trainer_maker(settings, tokenizer, examples, arguments, labels)
    model = load_base(source, settings, tokenizer, labels)
    if settings.task != "sft" and settings.quantization is not None:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    spectra = UpdateSpectra(model, peft_config, settings.track_updates) if settings.track_updates else None
    model = method.adapt(model, peft_config, partial(_backward, make))
    trainer = make(model, callbacks=method.callbacks(), optimizers=(method.optimizer(model, arguments), None))
    if isinstance(method, ScaLoraMethod):
        # Raises what attaching would, while an earlier run's folder is still there.
        attach(trainer.model, method.config.merge, method.config.remainder_rank)
    folder = Path(settings.output_dir) if resume else create_run_folder(settings)
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.add_callback(MetricsFile(folder))
    if spectra is not None:
        spectra.write_to(folder)
        trainer.add_callback(spectra)

    start = time.perf_counter()
    try:
        output = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except Exception:
        print(file=sys.stderr)  # ends the progress bar's line, so that the error has one of its own
        raise
    seconds = time.perf_counter() - start
    summary = {
        "steps": output.global_step,
        "training_seconds": seconds,
        **output.metrics,
        **costs(trainer.model, clock),
    }
    if "eval" in examples:
        summary |= _final_scores(trainer)
    written = _write_results(trainer, tokenizer, settings, method, folder) if settings.save_model else []
    write_json(folder / "summary.json", summary)
    for name in written:
        print(f"{name} written to {folder / name}")
    return folder


def _final_scores(trainer: Trainer) -> dict[str, float]:
    """Of the model as it is now: those of the last step where the Trainer has just taken them."""
    last: dict[str, Any] = next((log for log in reversed(trainer.state.log_history) if "eval_loss" in log), {})
    if last.get("step") == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return {key: value for key, value in last.items() if key.startswith("eval_")}
    scores: dict[str, float] = trainer.evaluate()
    return scores


def _write_results(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, settings: Settings, method: Method, folder: Path
) -> list[str]:
    """What a run leaves behind, each in a folder of its own; returns their names.

    ``model`` is the merged model, unless the base is quantised and can't take the update. ``adapter`` is an ordinary
    adapter where it costs nothing: of a method that leaves the base as it was, and of a factored remainder. ``delta``
    is the exact state of a ScaLoRA run, for `scalora export`.
    """
    model = trainer.model
    results: dict[str, Callable[[Path], Any]] = {}
    if isinstance(method, ScaLoraMethod):
        pairs = find_lora_pairs(model)
        results["delta"] = lambda target: write_state(target / STATE_FILE, state_of(model, pairs))
        if isinstance(pairs[0].remainder, FactoredRemainder):
            results["adapter"] = lambda target: write_adapter(model, pairs, target)
    elif isinstance(model, PeftModel) and method.ordinary_adapter:
        results["adapter"] = lambda target: model.save_pretrained(target)
    if settings.quantization is None:

        def save_model(target: Path) -> None:
            method.merged(model).save_pretrained(target)  # type: ignore[operator]
            save_tokenizer(tokenizer, target)

        results["model"] = save_model
    for name, write in results.items():
        with atomic_folder(folder / name) as target:
            write(target)
    return list(results)


def training_arguments(settings: Settings, method: Method, *, evaluates: bool) -> TrainingArguments:
    """The trainer's arguments: the user's over ours over the library's.

    Raises:
        InputError: a value that the library refuses.
    """
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    defaults: dict[str, Any] = {
        "output_dir": str(trainer_folder(settings)),
        "report_to": "none",  # no reporting service unless one is named
        "logging_steps": 10,  # the library's 500 shows nothing of a short run
        "save_strategy": "no",  # the result is in the run folder; checkpoints are for runs that are worth resuming
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


def _backward(make: MakeTrainer, model: nn.Module) -> None:
    """A few training batches forward and backward, as training itself would see them."""
    trainer = make(model)
    for batch in islice(trainer.get_train_dataloader(), GRADIENT_BATCHES):
        trainer.compute_loss(model, trainer._prepare_inputs(batch)).backward()


def _require_supported_optimizer(arguments: TrainingArguments) -> None:
    """Build the Trainer's optimizer over one small parameter: a refusal comes before the model is loaded."""
    try:
        cls, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments)
        group = {"params": [torch.nn.Parameter(torch.zeros(1, 1))], "weight_decay": arguments.weight_decay}
        optimizer = cls([group], **keywords)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"training.optim={getattr(arguments.optim, 'value', arguments.optim)!r}: {error}") from None
    state_degrees(optimizer)


def trainer_maker(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    examples: dict[str, Dataset],
    arguments: TrainingArguments,
    labels: list[str] | None,
) -> MakeTrainer:
    """What makes a trainer of a model, over the data as the task needs it.

    Args:
        settings: of the run.
        tokenizer: of the model.
        examples: by split, ``train`` and perhaps ``eval``.
        arguments: of the trainer.
        labels: names of the classes in order; None for other tasks.

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
