"""Scores of models for preferences, rewards and reinforcement learning: what their trainers log of an evaluation."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from scalora.rivals.method import Method
from scalora.runs.data import Examples
from scalora.runs.errors import InputError
from scalora.runs.formats import is_conversational, trl_examples
from scalora.runs.lengths import require_readable
from scalora.runs.model_limits import require_trl_tokens
from scalora.runs.models import Source, load_base, load_causal_model, resolve_source
from scalora.runs.prepare import training_arguments
from scalora.runs.rewards import reward_functions
from scalora.runs.settings import Settings
from scalora.runs.tasks import Task
from scalora.runs.training_defaults import NOT_TRAINING
from scalora.runs.trl_trainers import trl_trainer

_PAIRS = {
    "loss": "loss",
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "chosen": "rewards/chosen",
    "rejected": "rewards/rejected",
}

_SCORES: Mapping[Task, Mapping[str, str]] = {
    "dpo": _PAIRS,
    "orpo": _PAIRS,
    "kto": {name: metric for name, metric in _PAIRS.items() if name != "accuracy"},
    "reward": {"loss": "loss", "accuracy": "accuracy", "margin": "margin"},
    "grpo": {"reward": "reward"},
}
"""What TRL calls the scores of each task."""


def trl_scores(
    source: Source, tokenizer: PreTrainedTokenizerBase, examples: Examples, settings: Settings
) -> dict[str, float]:
    """Score a model as the trainer of its task evaluates it.

    Args:
        source: where the model is.
        tokenizer: the model's tokenizer.
        examples: the examples.
        settings: the config, of which ``data``, ``task``, ``training``, ``evaluate`` and ``reward`` matter, and
            ``model``, which dpo and kto compare the model with.

    Returns:
        The scores by name: for dpo and orpo the ``"loss"``, the share of the pairs whose preferred answer has the
        higher reward (``"accuracy"``), the mean difference of the two rewards (``"margin"``), and the means of both
        (``"chosen"``, ``"rejected"``); for kto the same without the share; for reward the loss, the share and the
        difference; for grpo the mean ``"reward"`` of new answers, and that of each function. Besides the number of
        examples that ``training.max_length`` leaves out, as ``"left_out"``.

    Raises:
        InputError: an example, a training argument or the rewards can't be used, or a score is of sft alone.
    """
    task, name = settings.task, examples.name
    for metric in settings.evaluate.metrics:
        if metric != "loss":
            raise InputError(
                f"evaluate.metrics: {metric!r} is a score of sft models; task {task!r} has "
                f"{', '.join(_SCORES[task])}: leave evaluate.metrics out"
            )
    data = trl_examples(examples.rows, name, settings.data, task)
    require_trl_tokens(tokenizer, task, settings.training, conversations=is_conversational(data))
    rewards = reward_functions(settings.reward, data.column_names) if task == "grpo" else []
    model = load_base(source, settings, tokenizer, None, new_head=False)
    options: dict[str, Any] = {}
    if task in ("dpo", "kto"):
        options["ref_model"] = load_causal_model(resolve_source(settings.model), settings)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trl_trainer(settings, Method, rewards)(
            model,
            args=_arguments(settings, scratch),
            train_dataset=data.select(range(1)),  # it must have one
            eval_dataset=data,
            processing_class=tokenizer,
            **options,
        )
        require_readable(trainer.eval_dataset, name, tokenizer, trainer)
        found = trainer.evaluate()
        made = 2 if task == "kto" and "chosen" in data.column_names else 1  # examples of a pair
        left_out = made * len(data) - len(trainer.eval_dataset)
    scores = {score: found[f"eval_{key}"] for score, key in _SCORES[task].items() if f"eval_{key}" in found}
    if task == "grpo":
        names = [f"rewards/{function.__name__}" for function in rewards]
        scores |= {name: found[f"eval_{name}/mean"] for name in names}
    return scores | ({"left_out": left_out} if left_out else {})


def _arguments(settings: Settings, scratch: str) -> Any:
    """The training arguments, of which those that are not about scoring are as if there was no training."""
    task = settings.task
    batch = settings.evaluate.batch_size
    given = dict(settings.training)
    if task == "kto":  # whose loss is defined by the batches: those of the evaluations in training
        batch = given.get("per_device_eval_batch_size", 8)
    if task == "grpo":  # all answers to a prompt are in one batch
        answers = given.get("num_generations_eval") or given.get("num_generations", 8)
        batch = max(batch // answers, 1) * answers
    ours = NOT_TRAINING | {
        "bf16": False,  # scores are computed in the model's own dtype
        "fp16": False,
        "gradient_checkpointing": False,
        "per_device_eval_batch_size": batch,
        "push_to_hub": False,
    }
    for key in ("precompute_ref_log_probs", "sync_ref_model"):
        given.pop(key, None)
    changed = settings.model_copy(update={"training": given | ours, "output_dir": scratch})
    return training_arguments(changed, Method(), evaluates=False)
