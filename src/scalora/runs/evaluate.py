"""``scalora evaluate``: scores of a saved model on evaluation data."""

from __future__ import annotations

import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.trainer_utils import PredictionOutput
from trl import SFTConfig, SFTTrainer

from scalora.parallel.job import from_all, join
from scalora.runs.data import Examples, examples_of, first_examples, tokenized_for_classification
from scalora.runs.errors import InputError
from scalora.runs.exact_match import exact_match_score
from scalora.runs.formats import is_conversational, trl_examples, used_columns
from scalora.runs.kept import Kept
from scalora.runs.lengths import require_readable
from scalora.runs.losses import CausalTrainer, SequenceTrainer
from scalora.runs.math_score import math_score
from scalora.runs.model_limits import require_known_tokens, require_trl_tokens, text_limit
from scalora.runs.models import (
    class_names,
    fingerprint,
    load_classifier,
    load_tokenizer,
    resolve_source,
)
from scalora.runs.multiple_choice import multiple_choice_score
from scalora.runs.scored_model import load_scored
from scalora.runs.scores import (
    CLASSIFICATION_SCORES,
    REGRESSION_SCORES,
    classification_scores,
    head_outputs,
    regression_scores,
)
from scalora.runs.settings import Settings
from scalora.runs.tasks import LABELLED
from scalora.runs.training_defaults import NOT_TRAINING
from scalora.runs.trl_scores import trl_scores

# The training arguments that decide which tokens of an evaluation are scored, and by which loss.
_LOSS_ARGUMENTS = {
    "assistant_only_loss",
    "chat_template_path",
    "completion_only_loss",
    "dataset_kwargs",
    "dataset_num_proc",
    "dataset_text_field",
    "eos_token",
    "eval_packing",
    "label_smoothing_factor",
    "loss_type",
    "max_length",
    "packing",
    "packing_strategy",
    "pad_to_multiple_of",
    "pad_token",
    "padding_free",
    "router_aux_loss_coef",
    "seed",
    "shuffle_dataset",
    "truncation_mode",
    "use_cpu",
}
_HEAD_LOSS_ARGUMENTS = {"label_smoothing_factor", "use_cpu"}  # the same for classification and regression


def evaluate(model: str, settings: Settings, output: Path | None = None) -> dict[str, Any]:
    """Score a model on the evaluation data of a config.

    In a job of several processes, as torchrun starts them, each loads the model and takes a part of the examples, and
    all return the scores.

    Args:
        model: run folder, model folder, GGUF file or hub id; for sft also a checkpoint or the folder of an adapter.
        settings: the config, of which ``data``, ``task``, ``evaluate`` and ``training`` matter.
        output: folder for the scores and the outputs for each example, which is created. Answers and log-likelihoods
            are kept there as they are computed, and an evaluation that is killed goes on from them. None: nothing is
            written.

    Returns:
        The scores by name, with the numbers of examples that they leave out or cut; the number of ``"examples"``; and
        ``"weights"``, which identifies the weights scored.

    Raises:
        InputError: the model, the data or a column is missing, or `output` holds something else.
    """
    join(use_cpu=bool(settings.training.get("use_cpu", False)))
    source = None if settings.task == "sft" else resolve_source(model)
    if settings.data.eval is None:
        raise InputError("data.eval is missing: set it to the file to evaluate on")
    data = Examples(*first_examples(examples_of(settings.data, settings.data.eval, "test"), settings.evaluate.limit))
    if source is None:
        return _sft_scores(model, data, settings, output)
    tokenizer = load_tokenizer(source, settings)
    scores: dict[str, Any] = {"weights": fingerprint(source), "examples": len(data.rows)}
    kept = Kept(output)
    if settings.task not in LABELLED:
        scores |= trl_scores(source, tokenizer, data, settings)
    else:
        labels = class_names(source, settings)
        classifier = load_classifier(source, settings, tokenizer, labels, new_head=False)
        scores |= sequence_scores(classifier, tokenizer, *data, settings, labels, kept)
    kept.finish(scores)
    return scores


def _sft_scores(model: str, data: Examples, settings: Settings, output: Path | None) -> dict[str, Any]:
    scored = load_scored(model, settings)
    scored.place(settings)
    kept = Kept(output, scored.identity(settings))
    scores: dict[str, Any] = {"weights": scored.weights, "examples": len(data.rows)}
    for metric in settings.evaluate.metrics:
        scores |= _SFT_METRICS[metric](scored.model, scored.tokenizer, *data, settings, kept)
    kept.finish(scores)
    return scores


def loss_score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset,
    name: str,
    settings: Settings,
    kept: Kept | None = None,
) -> dict[str, float]:
    """Loss and perplexity on the tokens that the config trains on: what training logs as ``eval_loss``.

    Args:
        model: the causal language model.
        tokenizer: the model's tokenizer.
        examples: the examples, in one of TRL's formats.
        name: name of the data, for error messages.
        settings: the config, of which ``data``, ``evaluate.batch_size`` and ``training`` matter.
        kept: of no use here, where nothing is computed for one example alone.

    Returns:
        ``"loss"``, the mean over all tokens; ``"perplexity"`` of the tokens; and, unless examples are packed, the
        numbers of examples that are left out (``"loss_left_out"``) and cut off (``"loss_cut_off"``) by
        ``training.max_length``.

    Raises:
        InputError: an example or a training argument can't be used, or no token is left to score.
    """
    data = trl_examples(examples, name, settings.data, "sft")
    require_trl_tokens(tokenizer, "sft", settings.training, conversations=is_conversational(data))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _loss_trainer(model, tokenizer, data, settings, scratch)
        if not len(trainer.eval_dataset):
            raise InputError(
                f"data {name!r}: none of the {len(data)} examples has a token to score within "
                f"training.max_length={trainer.args.max_length}"
            )
        require_readable(trainer.eval_dataset, name, tokenizer, trainer)
        cut = {} if trainer.args.eval_packing else _cut(trainer, len(data), name)
        total, tokens = 0.0, 0

        # The loss may be smoothed or weighted, and the perplexity is that of the likelihoods.
        def add(module: nn.Module, given: Any, output: Any) -> None:
            nonlocal total, tokens
            if (log_probs := getattr(output, "log_probs", None)) is not None:
                total -= float(log_probs.double().sum())
                tokens += int(output.label_mask.sum())

        counting = trainer.model.register_forward_hook(add)
        try:
            loss = float(trainer.evaluate()["eval_loss"])
        finally:
            counting.remove()
    totals, counts = zip(*from_all((total, tokens)), strict=True)
    total, tokens = math.fsum(totals), sum(counts)
    # Early versions of TRL take the loss from the model, and give no likelihoods.
    mean = torch.tensor(total / tokens if tokens else loss, dtype=torch.float64)
    return {"loss": loss, "perplexity": mean.exp().item(), **cut}


def _loss_trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Dataset, settings: Settings, scratch: str
) -> SFTTrainer:
    """A trainer that evaluates examples as that of `scalora train` would."""
    training = {key: value for key, value in settings.training.items() if key in _LOSS_ARGUMENTS}
    ours = {"output_dir": scratch, "per_device_eval_batch_size": settings.evaluate.batch_size} | _not_training()
    try:
        arguments = SFTConfig(**{"dataset_text_field": settings.data.text} | training | ours)
        if arguments.eval_packing is None:
            arguments.eval_packing = arguments.packing
        return CausalTrainer(
            model=model,
            args=arguments,
            train_dataset=data.select(range(1)),  # it must have one, which tells it the format of the data
            eval_dataset=data,
            processing_class=tokenizer,
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"the loss can't be computed as training would: {error}") from None


def _cut(trainer: SFTTrainer, loaded: int, name: str) -> dict[str, int]:
    """What ``training.max_length`` keeps from being scored."""
    limit, end = trainer.args.max_length, trainer.processing_class.eos_token_id
    ends = trainer.args.truncation_mode == "keep_start"  # else any example that is long enough may have been cut
    counts = {
        "loss_left_out": loaded - len(trainer.eval_dataset),
        "loss_cut_off": sum(
            len(ids) == limit and not (ends and ids[-1] == end) for ids in trainer.eval_dataset["input_ids"]
        ),
    }
    for count, what in zip(counts.values(), ("left out: nothing to score is within", "cut off at"), strict=True):
        if count:
            warnings.warn(
                f"data {name!r}: {count:,} of {loaded:,} examples are {what} training.max_length={limit} tokens",
                stacklevel=3,
            )
    return counts


_SFT_METRICS = {
    "loss": loss_score,
    "exact_match": exact_match_score,
    "math": math_score,
    "multiple_choice": multiple_choice_score,
}


def sequence_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset,
    name: str,
    settings: Settings,
    labels: list[str] | None,
    kept: Kept | None = None,
) -> dict[str, float]:
    """Loss and scores of a model for classification or regression.

    Args:
        model: the model with its head.
        tokenizer: the model's tokenizer.
        examples: the examples, with a text and a label.
        name: name of the data, for error messages.
        settings: the config, of which ``data``, ``task``, ``evaluate.batch_size`` and ``training`` matter.
        labels: names of the classes in order; None for regression.
        kept: where the outputs for each example are kept. None: nowhere.

    Returns:
        ``"loss"``, and ``"accuracy"``, ``"f1"`` (macro average) and ``"matthews"`` for classification, or
        ``"pearson"``, ``"spearman"`` and ``"mse"`` for regression; and ``"truncated"``, the number of examples of which
        the end is left out.

    Raises:
        InputError: an example can't be used.
    """
    limit = text_limit(settings.data.max_tokens, tokenizer, model)
    data, truncated = tokenized_for_classification(
        examples, name, settings.data, settings.task, tokenizer, labels, limit
    )
    require_known_tokens(data, name, tokenizer, model)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SequenceTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                per_device_eval_batch_size=settings.evaluate.batch_size,
                **{key: settings.training[key] for key in _HEAD_LOSS_ARGUMENTS if key in settings.training},
                **_not_training(),
            ),
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=regression_scores if labels is None else classification_scores,
        )
        predicted = trainer.predict(data, metric_key_prefix="eval")
    if kept is not None:
        kept.write(settings.task, _outputs(predicted, examples, settings, labels))
    scores = predicted.metrics
    names = ("loss", *(REGRESSION_SCORES if labels is None else CLASSIFICATION_SCORES))
    return {score: scores[f"eval_{score}"] for score in names} | {"truncated": truncated}


def _outputs(
    predicted: PredictionOutput, examples: Dataset, settings: Settings, labels: list[str] | None
) -> list[dict[str, Any]]:
    """What a model for classification or regression says of each example, and what is right."""
    columns = used_columns(examples, "", settings.data, settings.task)[:-1]
    texts, goals = examples.select_columns(columns), predicted.label_ids.tolist()
    found: list[dict[str, Any]]
    if labels is None:
        values = head_outputs(predicted).squeeze(-1).tolist()
        found = [{"prediction": value, "label": goal} for value, goal in zip(values, goals, strict=True)]
    else:
        found = [
            {"prediction": (name := _likeliest(row, labels)), "label": labels[goal], "right": name == labels[goal]}
            for row, goal in zip(head_outputs(predicted), goals, strict=True)
        ]
    return [
        {"row": number, **text, **outcome}
        for number, (text, outcome) in enumerate(zip(texts, found, strict=True), start=1)
    ]


def _likeliest(logits: Any, labels: list[str]) -> str | None:
    """The class that a model predicts; None if its outputs are not numbers."""
    return None if np.isnan(logits).any() else labels[int(logits.argmax())]


def _not_training() -> dict[str, Any]:
    return NOT_TRAINING | {
        "bf16": False,  # scores are computed in the model's own dtype; TRL's default is autocast to bfloat16
        "dataloader_pin_memory": torch.cuda.is_available(),  # without an accelerator it only warns
    }
