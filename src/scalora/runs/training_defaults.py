"""Defaults of `scalora train` where they differ from those of the libraries' training arguments and LoRA settings."""

from __future__ import annotations

from typing import Any

from scalora.runs.tasks import Task

TRAINING_DEFAULTS: dict[str, Any] = {
    "report_to": "none",  # no reporting service unless one is named
    "logging_steps": 10,  # Transformers' 500 shows nothing of a short run
    "logging_nan_inf_filter": False,  # true would log the loss of a run that has diverged as 0
    "save_strategy": "no",  # the result is in the run folder; checkpoints are for runs that are worth resuming
}
"""Training arguments whose default is the same for every run."""

IN_ONE_PROCESS: dict[str, Any] = {"fsdp": None, "fsdp_config": None, "deepspeed": None}
"""Training arguments for a Trainer whose model is whole, whatever a run's config says."""

NOT_TRAINING: dict[str, Any] = IN_ONE_PROCESS | {
    "report_to": "none",
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
}
"""Training arguments for a Trainer that only evaluates or makes batches, whatever a run's config says: it does not
report, save, or evaluate by itself."""

_WITH_PAIR_ADAMW: tuple[Task, ...] = ("sft", "classification", "regression")


def takes_pair_adamw(task: Task, method: str) -> bool:
    """Whether the optimizer is `scalora.PairAdamW` by default: for the tasks on which it was compared with AdamW.

    That is with matrices, which are the default then, and with block signs. They were level with columns and with
    AdamW on all of these tasks, or ahead (docs/results.md, docs/experiments.md).

    Args:
        task: the run's task.
        method: the run's method.
    """
    return method in ("scalora", "block_signs") and task in _WITH_PAIR_ADAMW


DEPENDENT_DEFAULTS: dict[str, tuple[Any, str]] = {
    "output_dir": (None, "the folder trainer in the run folder"),
    "eval_strategy": ("epoch", "epoch if data.eval is set, else no"),
    "bf16": (True, "true on a GPU that supports bfloat16, else false"),
    "dataloader_pin_memory": (True, "true with a CUDA GPU, else false"),
    "dataset_text_field": ("text", "data.text"),
    "task_type": ("CAUSAL_LM", "SEQ_CLS for classification, regression and reward, else CAUSAL_LM"),
}
"""The other defaults, which `scalora.runs.prepare` sets: an example of a value, and what it depends on."""
