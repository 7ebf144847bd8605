"""``scalora evaluate``: scores of a saved model on evaluation data."""

from __future__ import annotations

import math
import re
import tempfile
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from scalora.runs.data import load_examples, require_columns, sft_examples, tokenized_for_classification
from scalora.runs.errors import InputError
from scalora.runs.models import (
    class_names,
    fingerprint,
    load_causal_model,
    load_classifier,
    load_tokenizer,
    resolve_source,
)
from scalora.runs.scores import classification_scores, regression_scores
from scalora.runs.settings import EvaluateSettings, Settings
from scalora.runs.track import track
from scalora.runs.training_defaults import NOT_TRAINING


def evaluate(model: str, settings: Settings) -> dict[str, Any]:
    """Score a model on the evaluation data of a config.

    Args:
        model: run folder, model folder, GGUF file or hub id.
        settings: the config, of which ``data.eval``, ``task`` and ``evaluate`` matter.

    Returns:
        The scores by name, the number of ``"examples"``, and ``"weights"``, which identifies the weights scored.

    Raises:
        InputError: the model, the data or a column is missing.
    """
    source = resolve_source(model)
    name = settings.data.eval
    if name is None:
        raise InputError("data.eval is missing: set it to the file to evaluate on")
    examples = load_examples(name, "test")
    if settings.evaluate.limit is not None:
        examples = examples.select(range(min(settings.evaluate.limit, len(examples))))
    tokenizer = load_tokenizer(source, settings)
    scores: dict[str, Any] = {"weights": fingerprint(source), "examples": len(examples)}
    if settings.task == "sft":
        causal = load_causal_model(source, settings)
        for metric in settings.evaluate.metrics:
            scores |= _SFT_METRICS[metric](causal, tokenizer, examples, name, settings)
        return scores
    labels = class_names(source, settings)
    classifier = load_classifier(source, settings, tokenizer, labels, new_head=False)
    return scores | sequence_scores(classifier, tokenizer, examples, name, settings, labels)


def loss_score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Dataset, name: str, settings: Settings
) -> dict[str, float]:
    """Loss per token and perplexity, on the tokens that TRL trains on: those of the completion if there is one.

    Args:
        model: the causal language model.
        tokenizer: the model's tokenizer.
        examples: the examples, in one of TRL's formats.
        name: name of the data, for error messages.
        settings: the config, of which ``data``, ``evaluate.batch_size`` and ``training.max_length`` matter.

    Returns:
        ``"loss"``, the mean over all tokens, and ``"perplexity"``.

    Raises:
        InputError: an example can't be used.
    """
    data = sft_examples(examples, name, settings.data)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = SFTConfig(
            output_dir=scratch,
            per_device_eval_batch_size=settings.evaluate.batch_size,
            dataset_text_field=settings.data.text,
            **_not_training(),
            **{key: value for key, value in settings.training.items() if key == "max_length"},
        )
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer
        )
        loss, tokens = 0.0, 0
        trainer.model.eval()
        for batch in track(trainer.get_eval_dataloader(), "loss"):
            count = int((batch["labels"][:, 1:] != -100).sum())
            with torch.no_grad():
                loss += float(model(**batch).loss) * count
            tokens += count
    return {"loss": loss / tokens, "perplexity": math.exp(loss / tokens)}


def _exact_match_score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Dataset, name: str, settings: Settings
) -> dict[str, float]:
    """Share of greedily generated answers that equal the completion, except for white space at the ends."""
    prompts, answers = _prompts_and_answers(examples, name, tokenizer)
    generated = _generate_answers(model, tokenizer, prompts, settings.evaluate)
    pattern = settings.evaluate.answer_pattern
    pairs = zip(generated, answers, strict=True)
    return {"exact_match": sum(_extract(g, pattern) == _extract(a, pattern) for g, a in pairs) / len(answers)}


@torch.no_grad()
def _generate_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], settings: EvaluateSettings
) -> list[str]:
    """Greedy continuations of prompts, in batches with padding on the left."""
    model.eval()
    tokenizer.padding_side = "left"
    answers: list[str] = []
    for start in track(range(0, len(prompts), settings.batch_size), "generating"):
        batch = tokenizer(
            prompts[start : start + settings.batch_size], return_tensors="pt", padding=True, add_special_tokens=False
        ).to(model.device)
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        answers += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def _multiple_choice_score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Dataset, name: str, settings: Settings
) -> dict[str, float]:
    """Share of examples whose correct choice has the highest log-likelihood given the prompt.

    Needs the columns ``prompt``, ``choices`` (texts), and ``answer`` (index or text of the correct choice).
    """
    require_columns(examples, name, ["prompt", "choices", "answer"])
    model.eval()
    right = 0
    for row in track(examples, "multiple choice"):
        likelihoods = torch.stack([_log_likelihood(model, tokenizer, row["prompt"], c) for c in row["choices"]])
        best = int(likelihoods.argmax())
        right += row["answer"] in (best, row["choices"][best])
    return {"multiple_choice": right / len(examples)}


_SFT_METRICS = {"loss": loss_score, "exact_match": _exact_match_score, "multiple_choice": _multiple_choice_score}


@torch.no_grad()
def _log_likelihood(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, choice: str) -> Tensor:
    given = tokenizer(prompt)["input_ids"]
    whole = tokenizer(prompt + choice)["input_ids"]
    logits: Tensor = model(input_ids=torch.tensor([whole], device=model.device)).logits[0, len(given) - 1 : -1]
    tokens = torch.tensor(whole[len(given) :], device=model.device)
    return logits.float().log_softmax(-1).gather(-1, tokens[:, None]).sum()


def _prompts_and_answers(
    examples: Dataset, name: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], list[str]]:
    """The prompts as text for the model to continue, and the expected answers."""
    if "messages" in examples.column_names:
        return (
            [_templated(messages[:-1], tokenizer) for messages in examples["messages"]],
            [messages[-1]["content"] for messages in examples["messages"]],
        )
    require_columns(examples, name, ["prompt", "completion"])
    prompts, completions = list(examples["prompt"]), list(examples["completion"])
    if isinstance(prompts[0], list):
        return [_templated(p, tokenizer) for p in prompts], [c[-1]["content"] for c in completions]
    return prompts, completions


def _templated(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _extract(text: str, pattern: str | None) -> str | None:
    if pattern is None:
        return text.strip()
    match = re.search(pattern, text)
    return None if match is None else (match.group(1) if match.groups() else match.group(0)).strip()


def sequence_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset,
    name: str,
    settings: Settings,
    labels: list[str] | None,
) -> dict[str, float]:
    """Loss and scores of a model for classification or regression.

    Args:
        model: the model with its head.
        tokenizer: the model's tokenizer.
        examples: the examples, with a text and a label.
        name: name of the data, for error messages.
        settings: the config, of which ``data``, ``task`` and ``evaluate.batch_size`` matter.
        labels: names of the classes in order; None for regression.

    Returns:
        ``"loss"``, and ``"accuracy"``, ``"f1"`` (macro average) and ``"matthews"`` for classification, or
        ``"pearson"``, ``"spearman"`` and ``"mse"`` for regression.

    Raises:
        InputError: an example can't be used.
    """
    regression = labels is None
    data = tokenized_for_classification(examples, name, settings.data, settings.task, tokenizer, labels)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch, per_device_eval_batch_size=settings.evaluate.batch_size, **_not_training()
            ),
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=regression_scores if regression else classification_scores,
        )
        scores = trainer.evaluate(data)
    names = ("loss", *(("pearson", "spearman", "mse") if regression else ("accuracy", "f1", "matthews")))
    return {name: scores[f"eval_{name}"] for name in names}


def _not_training() -> dict[str, Any]:
    return NOT_TRAINING | {
        "bf16": False,  # scores are computed in the model's own dtype; TRL's default is autocast to bfloat16
        "dataloader_pin_memory": torch.cuda.is_available(),  # without an accelerator it only warns
    }
