"""``scalora train``: from a config to a run folder, through TRL's and Transformers' trainers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
from trl import SFTTrainer

from scalora.adapters import find_lora_pairs
from scalora.changed_base import attach, state_of
from scalora.cli.data import label_names, load_examples, sft_examples, tokenized_for_classification
from scalora.cli.errors import InputError
from scalora.cli.models import (
    Source,
    load_causal_model,
    load_classifier,
    load_tokenizer,
    resolve_source,
    save_tokenizer,
)
from scalora.cli.run_folder import (
    MetricsFile,
    check_resumable,
    check_run_folder,
    create_run_folder,
    trainer_folder,
    write_json,
)
from scalora.cli.scores import classification_scores, regression_scores
from scalora.cli.settings import Settings, training_class
from scalora.config import ScaLoraConfig
from scalora.integrations.checkpoints import last_checkpoint
from scalora.integrations.transformers import ScaLoraCallback
from scalora.ordinary_adapter import write_adapter
from scalora.remainder import FactoredRemainder
from scalora.state import STATE_FILE, write_state
from scalora.transport import state_degrees
from scalora.writing import whole_folder

# The rank of the paper's large-model experiments, alpha = r so that the scaling is 1 (its s), and all linear layers
# because leaving some out is what a comparison with full fine-tuning notices first.
_LORA_DEFAULTS: dict[str, Any] = {"r": 8, "lora_alpha": 8, "target_modules": "all-linear"}


def train(settings: Settings, *, overwrite: bool = False, resume: bool = False) -> Path:
    """Train and write the run folder; returns its path.

    Args:
        settings: of the run.
        overwrite: replace an earlier run's folder.
        resume: go on from its last whole checkpoint instead.

    Raises:
        InputError: something in the config, the data or the model can't be used. Before training, so nothing is lost.
    """
    checkpoint = None
    if resume:
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
    callback = ScaLoraCallback(ScaLoraConfig.from_dict(settings.scalora)) if settings.method == "scalora" else None
    arguments = training_arguments(settings, evaluates="eval" in examples)
    lora_config = None if settings.method == "full" else _lora_config(settings)
    if callback is not None:
        _require_supported_optimizer(arguments)
    tokenizer = load_tokenizer(source, settings)
    # The Trainer seeds itself only once it has the model, whose new head and adapter are random too.
    set_seed(arguments.seed)
    make = _sft_trainer if settings.task == "sft" else _classification_trainer
    trainer = make(settings, source, tokenizer, examples, arguments, lora_config, callback)
    if callback is not None:
        # Raises what attaching would, while an earlier run's folder is still there.
        attach(trainer.model, callback.config.merge, callback.config.remainder_rank)
    folder = Path(settings.output_dir) if resume else create_run_folder(settings)
    trainer.add_callback(MetricsFile(folder))

    start = time.perf_counter()
    try:
        output = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except Exception:
        print(file=sys.stderr)  # ends the progress bar's line, so that the error has one of its own
        raise
    seconds = time.perf_counter() - start
    summary = {"steps": output.global_step, "training_seconds": seconds, **output.metrics}
    if "eval" in examples:
        summary |= trainer.evaluate()
    written = _write_results(trainer, tokenizer, settings, folder)
    write_json(folder / "summary.json", summary)
    for name in written:
        print(f"{name} written to {folder / name}")
    return folder


def _write_results(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, settings: Settings, folder: Path) -> list[str]:
    """What a run leaves behind, each in a folder of its own; returns their names.

    ``model`` is the merged model, unless the base is quantised and can't take the update. ``adapter`` is an ordinary
    adapter where it costs nothing: of plain LoRA, and of a factored remainder. ``delta`` is the exact state of a
    ScaLoRA run, for `scalora export`.
    """
    model = trainer.model
    results: dict[str, Callable[[Path], Any]] = {}
    if settings.method == "scalora":
        pairs = find_lora_pairs(model)
        results["delta"] = lambda target: write_state(target / STATE_FILE, state_of(model, pairs))
        if isinstance(pairs[0].remainder, FactoredRemainder):
            results["adapter"] = lambda target: write_adapter(model, pairs, target)
    elif settings.method == "lora":
        results["adapter"] = lambda target: model.save_pretrained(target)
    if settings.quantization is None:

        def save_model(target: Path) -> None:
            whole = model if settings.method == "full" else model.merge_and_unload()
            whole.save_pretrained(target)
            save_tokenizer(tokenizer, target)

        results["model"] = save_model
    for name, write in results.items():
        with whole_folder(folder / name) as target:
            write(target)
    return list(results)


def training_arguments(settings: Settings, *, evaluates: bool) -> TrainingArguments:
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
    if settings.method != "full":
        # The libraries' 2e-5 and 5e-5 are for full fine-tuning and leave an adapter where it was; of 1e-3, 2e-3 and
        # 4e-3 this is the best or within noise of it on the measured tasks (docs/defaults.md).
        defaults["learning_rate"] = 1e-3
    if settings.task == "sft" and settings.data.text != "text":
        defaults["dataset_text_field"] = settings.data.text
    try:
        return training_class(settings.task)(**defaults | settings.training)
    except (TypeError, ValueError) as error:
        raise InputError(f"training arguments: {error}") from None


def _lora_config(settings: Settings) -> LoraConfig:
    task_type = "CAUSAL_LM" if settings.task == "sft" else "SEQ_CLS"
    try:
        config = LoraConfig(task_type=task_type, **_LORA_DEFAULTS | settings.lora)
    except (TypeError, ValueError) as error:
        raise InputError(f"lora: {error}") from None
    # PEFT itself looks at the rank only when it builds the layers, after the model has been loaded.
    if not isinstance(config.r, int) or config.r < 1:
        raise InputError(f"lora.r={config.r!r}: the rank must be an integer of at least 1")
    return config


def _require_supported_optimizer(arguments: TrainingArguments) -> None:
    """Build the Trainer's optimizer over one small parameter: a refusal comes before the model is loaded."""
    try:
        cls, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments)
        group = {"params": [torch.nn.Parameter(torch.zeros(1, 1))], "weight_decay": arguments.weight_decay}
        optimizer = cls([group], **keywords)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"training.optim={getattr(arguments.optim, 'value', arguments.optim)!r}: {error}") from None
    state_degrees(optimizer)


def _sft_trainer(
    settings: Settings,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    examples: dict[str, Dataset],
    arguments: TrainingArguments,
    lora_config: LoraConfig | None,
    callback: ScaLoraCallback | None,
) -> Trainer:
    data = {
        split: sft_examples(rows, str(getattr(settings.data, split)), settings.data) for split, rows in examples.items()
    }
    return SFTTrainer(
        model=load_causal_model(source, settings),
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data.get("eval"),
        processing_class=tokenizer,
        peft_config=lora_config,
        callbacks=[callback] if callback else None,
    )


def _classification_trainer(
    settings: Settings,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    examples: dict[str, Dataset],
    arguments: TrainingArguments,
    lora_config: LoraConfig | None,
    callback: ScaLoraCallback | None,
) -> Trainer:
    regression = settings.task == "regression"
    labels = None if regression else label_names(examples["train"], str(settings.data.train), settings.data)
    data = {
        split: tokenized_for_classification(
            rows, str(getattr(settings.data, split)), settings.data, settings.task, tokenizer, labels
        )
        for split, rows in examples.items()
    }
    model = load_classifier(source, settings, tokenizer, labels, new_head=True)
    if lora_config is not None:
        if settings.quantization is not None:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model = get_peft_model(model, lora_config)
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data.get("eval"),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=regression_scores if regression else classification_scores,
        callbacks=[callback] if callback else None,
    )
