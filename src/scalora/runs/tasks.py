"""The tasks of a run, and which of TRL's and Transformers' classes train them. Imports neither."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Task = Literal["sft", "classification", "regression", "dpo", "kto", "orpo", "reward", "grpo"]


class Classes(NamedTuple):
    """What trains a task.

    Attributes:
        module: dotted name of the module of the two classes.
        arguments: name of the class of the training arguments.
        trainer: name of the trainer's class.
    """

    module: str
    arguments: str
    trainer: str


CLASSES: Mapping[Task, Classes] = {
    "sft": Classes("trl", "SFTConfig", "SFTTrainer"),
    "classification": Classes("transformers", "TrainingArguments", "Trainer"),
    "regression": Classes("transformers", "TrainingArguments", "Trainer"),
    "dpo": Classes("trl", "DPOConfig", "DPOTrainer"),
    "kto": Classes("trl", "KTOConfig", "KTOTrainer"),
    "orpo": Classes("trl.experimental.orpo", "ORPOConfig", "ORPOTrainer"),  # where TRL 1.16 has it
    "reward": Classes("trl", "RewardConfig", "RewardTrainer"),
    "grpo": Classes("trl", "GRPOConfig", "GRPOTrainer"),
}
"""The classes of each task, by name."""

LABELLED: tuple[Task, ...] = ("classification", "regression")
"""Tasks with one label per text, which Transformers' Trainer trains."""

WITH_HEAD: tuple[Task, ...] = (*LABELLED, "reward")
"""Tasks of a model with a head for sequences; the others are those of causal language models."""

PREFERENCES: tuple[Task, ...] = ("dpo", "kto", "orpo", "reward")
"""Tasks that learn from which of the answers are preferred."""

RATE_SHARES: Mapping[Task, float] = {
    **dict.fromkeys(("dpo", "kto", "orpo", "grpo"), 1e-2),
    "reward": 1e-1,
}
"""The default learning rate of a method, as a share of its default for sft. It makes LoRA's ten times TRL's defaults
for DPO, KTO, ORPO and GRPO (1e-6), which are meant for full fine-tuning, and TRL's default for reward models (1e-4)."""


def needs_reference(task: Task, training: Mapping[str, Any]) -> bool:
    """Whether a trainer compares the model at every step with the one that it was before training.

    Args:
        task: the task.
        training: the training arguments that were given.
    """
    if task in ("dpo", "kto"):
        return not training.get("precompute_ref_log_probs", False)
    return task == "grpo" and training.get("beta", 0.0) != 0.0
