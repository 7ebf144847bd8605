"""``scalora train --dry-run``: what a run would do, found without weights, without training and without writing."""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import Trainer

from scalora.config import Merge
from scalora.integrations.transformers import warn_if_plain_lora
from scalora.maths.mode import Mode
from scalora.model.adapters import LoraPair
from scalora.model.memory import Memory, bytes_of_base, pairs_over_quantised, quantisable_layers, training_memory
from scalora.model.placement import resolve_merge
from scalora.rivals.method import Method
from scalora.rivals.scalora import ScaLoraMethod
from scalora.runs.claim import check_unused
from scalora.runs.data import Examples
from scalora.runs.lengths import require_readable, token_counts, tokenised_head
from scalora.runs.lora_checks import check_adapted, check_names
from scalora.runs.messages import without_message
from scalora.runs.mixing import mixed
from scalora.runs.model_limits import TextLimit
from scalora.runs.models import empty_base
from scalora.runs.optimizer_checks import own_optimizer, stepped_in_pairs, uses_pair_adamw
from scalora.runs.prepare import PreparedRun, prepare, trainer_maker, training_arguments
from scalora.runs.results import result_names
from scalora.runs.settings import Settings, section_fields
from scalora.runs.shown_example import ShownExample, shown_examples
from scalora.runs.training_defaults import IN_ONE_PROCESS

_HEAD = 1000  # examples that are tokenised: enough to see their lengths, within seconds

_SHOWN = 2

# The Trainer makes its output folder, and a repository on the hub if it shall push to one, when it is made.
_WRITES_NOTHING = IN_ONE_PROCESS | {"report_to": "none", "push_to_hub": False}


@dataclass(frozen=True)
class Lengths:
    """Tokens of the first training examples, before anything is cut off.

    Attributes:
        examples: number of examples that were looked at.
        shortest: tokens of the shortest one.
        median: median number of tokens.
        longest: tokens of the longest one.
        limit: tokens after which an example is cut off; None without a limit.
        cut: number of examples that are cut off.
        left_out: number of examples that training leaves out, because no token to train on is within the limit.
    """

    examples: int
    shortest: int
    median: float
    longest: int
    limit: int | None
    cut: int
    left_out: int


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of a run.

    Attributes:
        per_epoch: steps of an epoch; None of a stream, which has no end.
        total: steps of the run.
        batch: examples per step; packed sequences, if examples are packed.
        estimated: whether the number of examples that are left, or sequences, is extrapolated from the first ones.
    """

    per_epoch: int | None
    total: int
    batch: int
    estimated: bool


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        run: the run, resolved and checked.
        model: class of the model.
        parameters: number of the base model's parameters.
        trained: number of parameters that are trained.
        optimizer: the optimizer's name.
        layers: number of layers that ScaLoRA rescales; 0 for other methods.
        mode: the kind of their scaling; None for other methods.
        merge: where their remainders go; None for other methods.
        memory: memory of training, without activations.
        lengths: tokens of the first examples.
        steps: optimizer steps.
        shown: the first examples.
        results: folders that the run would write in its run folder at its end.
    """

    run: PreparedRun
    model: str
    parameters: int
    trained: int
    optimizer: str
    layers: int
    mode: Mode | None
    merge: Merge | None
    memory: Memory
    lengths: Lengths
    steps: Steps
    shown: list[ShownExample]
    results: list[str]

    @property
    def pair_adamw(self) -> bool:
        """Whether the optimizer is `scalora.PairAdamW`; the memory of any other is counted as Adam's."""
        return uses_pair_adamw(self.run.settings, self.run.method)


def dry_run(settings: Settings, *, overwrite: bool = False, resume: bool = False) -> Plan:
    """Find out what a run would do, and raise what it would raise before training.

    The model is built from its config on torch's meta device. No weights are read, and nothing is written except the
    caches of the libraries that load the data. Not tried are reading the weights, the gradients that some starts need,
    and compiling ScaLoRA's C++ (``native``).

    Args:
        settings: the run's settings.
        overwrite: whether the run may replace an earlier run's folder.
        resume: whether to resume the run in the folder from its last whole checkpoint.

    Raises:
        InputError: something in the config, the data or the model's config can't be used.
    """
    check_unused(Path(settings.output_dir))
    run = prepare(settings, overwrite=overwrite, resume=resume)
    base = empty_base(run.source, settings, run.tokenizer, run.labels)
    parameters = sum(p.numel() for p in base.parameters())
    quantised = quantisable_layers(base) if settings.quantization else set()
    base_bytes = bytes_of_base(base, quantised, settings.quantization)
    model = _adapted(run, base)
    trainer, uncut = _trainers(run, model)
    require_readable(trainer.train_dataset, run.examples["train"].name, run.tokenizer, trainer)
    scales = isinstance(run.method, ScaLoraMethod)
    pairs = pairs_over_quantised(trainer.model, quantised) if scales else []
    merge = resolve_merge(pairs, *_placement(run)) if pairs else None
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    steps = _steps(run, trainer)
    if isinstance(run.method, ScaLoraMethod):
        warn_if_plain_lora(run.method.config, steps.total)
    return Plan(
        run=run,
        model=type(base).__name__,
        parameters=parameters,
        trained=sum(p.numel() for p in trained),
        optimizer=_optimizer(run, trainer),
        layers=len(pairs),
        mode=run.method.config.mode if isinstance(run.method, ScaLoraMethod) else None,
        merge=merge,
        memory=_memory(run, trainer.model, base_bytes, sum(p.nbytes for p in trained), pairs, merge),
        lengths=_lengths(run, trainer, uncut),
        steps=steps,
        shown=shown_examples(run, trainer, _SHOWN),
        results=result_names(run, factored=merge == "factored"),
    )


def _optimizer(run: PreparedRun, trainer: Trainer) -> str:
    """The name of the optimizer that is made already, or of the one that the Trainer will make."""
    if trainer.optimizer is not None:
        return type(trainer.optimizer).__name__
    return str(getattr(run.arguments.optim, "value", run.arguments.optim))


class _NeedsGradients(Exception):
    """A method's start asks for gradients of the adapted model, which has no weights."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model


def _adapted(run: PreparedRun, base: nn.Module) -> nn.Module:
    check_names(run, base)
    model = adapted_without_weights(run.method, base, run.peft_config)
    check_adapted(run, model)
    return model


def adapted_without_weights(method: Method, base: nn.Module, peft_config: PeftConfig | None) -> nn.Module:
    """The model as a method adapts it, without the numbers of its start.

    Args:
        method: the fine-tuning method.
        base: the base model on torch's meta device, which is modified.
        peft_config: the config of the adapter; None for methods that train all weights.
    """
    if isinstance(method, ScaLoraMethod):
        method = replace(method, start="zero")

    def stop(model: nn.Module) -> NoReturn:
        raise _NeedsGradients(model)

    try:
        with torch.device("meta"):
            return method.adapt(base, peft_config, stop)
    except _NeedsGradients as adapted:
        return adapted.model


def _trainers(run: PreparedRun, model: nn.Module) -> tuple[Trainer, Trainer]:
    """The trainer over the first examples, and one that does not cut them off."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        without_message("transformers.tokenization_utils_base", "Token indices sequence length is longer"),
    ):
        trainer = _trainer(run, model, scratch, run.text_limit)
        uncut: dict[str, Any] = {}
        if "max_length" in section_fields("training", run.settings.task):
            uncut["max_length"] = 2**31 if run.settings.task == "orpo" else None  # ORPO takes None for 512
        if run.settings.task == "sft":
            uncut["packing"] = False
        return trainer, _trainer(run, model, scratch, None, **uncut)


def _trainer(run: PreparedRun, model: nn.Module, scratch: str, limit: TextLimit | None, **changes: Any) -> Trainer:
    task = run.settings.task
    training = run.settings.training | _WRITES_NOTHING | {"output_dir": scratch} | changes
    if task in ("dpo", "kto"):
        training["precompute_ref_log_probs"] = False  # with weights that there are none of
    if task == "grpo":
        training["beta"] = 0.0  # its trainer would copy the adapter, or load the weights
    settings = run.settings.model_copy(update={"training": training})
    arguments = training_arguments(settings, run.method, evaluates="eval" in run.examples)
    # Not files, so that what is made of them is not written to a cache either.
    head = {split: _head(run, split) for split in run.examples}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is truncated of all examples has been said
        make = trainer_maker(settings, run.tokenizer, head, arguments, run.labels, limit)
    options: dict[str, Any] = {"optimizers": (own_optimizer(run.settings, run.method, model, arguments), None)}
    if task in ("dpo", "kto"):
        options["ref_model"] = reference = copy.deepcopy(model)  # for the same reason
        object.__setattr__(reference, "to", lambda *_, **__: reference)  # to a device, which takes weights
    return make(model, **options)


def _head(run: PreparedRun, split: str) -> Examples:
    """The first examples in the order of training."""
    rows, name = run.examples[split]
    if split == "train" and run.stream is None:
        rows = mixed(rows, name, run.settings.data.train, run.arguments.seed)
    return Examples(Dataset(rows.with_format("arrow")[:_HEAD], info=rows.info), str(name))


def _placement(run: PreparedRun) -> tuple[Merge, int]:
    assert isinstance(run.method, ScaLoraMethod)
    return run.method.config.merge, run.method.config.remainder_rank


def _memory(
    run: PreparedRun, model: nn.Module, base: int, trained: int, pairs: list[LoraPair], merge: Merge | None
) -> Memory:
    adapter = trained if isinstance(model, PeftModel) else 0
    in_pairs = stepped_in_pairs(run.settings, run.method, model)
    if merge is None:
        return training_memory(base, adapter, trained, in_pairs=in_pairs)
    return training_memory(base, adapter, trained, pairs, merge, _placement(run)[1], in_pairs=in_pairs)


def _lengths(run: PreparedRun, trainer: Trainer, uncut: Trainer) -> Lengths:
    counts = token_counts(tokenised_head(uncut.train_dataset, run.tokenizer))
    left_out = 0
    limit = None if run.text_limit is None else run.text_limit.tokens
    if hasattr(trainer.args, "max_length"):
        packing = getattr(trainer.args, "packing", False)
        # Unless the packing strategy is this one, an example that is too long goes on in the next sequence.
        limit = trainer.args.max_length if not packing or trainer.args.packing_strategy == "bfd" else None
        left_out = 0 if packing else len(counts) - len(trainer.train_dataset)
    cut = 0 if limit is None else sum(count > limit for count in counts)
    return Lengths(len(counts), min(counts), statistics.median(counts), max(counts), limit, cut, left_out)


def _steps(run: PreparedRun, trainer: Trainer) -> Steps:
    """As the Trainer counts them, whose own count wants a loader of all examples."""
    arguments, examples = run.arguments, run.count("train")
    per_device = arguments.train_batch_size * arguments.world_size
    batch = per_device * arguments.gradient_accumulation_steps
    if run.stream is not None:
        return Steps(per_epoch=None, total=arguments.max_steps, batch=batch, estimated=False)
    looked_at = min(examples, _HEAD)
    sequences = round(examples * len(trainer.train_dataset) / looked_at)
    if run.settings.task == "grpo":
        # Whole generations of answers to as many prompts, each of which is trained on num_iterations times.
        prompts = arguments.generation_batch_size // arguments.num_generations
        batches = examples // prompts * arguments.steps_per_generation * arguments.num_iterations
    else:
        batches = sequences // per_device if arguments.dataloader_drop_last else math.ceil(sequences / per_device)
    per_epoch = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    total = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * per_epoch)
    estimated = looked_at < examples and sequences != examples
    return Steps(per_epoch=per_epoch, total=total, batch=batch, estimated=estimated)
