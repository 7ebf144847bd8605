"""TRL's trainers for preferences, rewards and reinforcement learning, as `scalora train` uses them.

Checked with TRL 1.16. Two things differ from TRL. Evaluation metrics are means over examples and not over the means of
batches, so that they don't depend on the size of the last batch. And the reference is the model without its adapter
wherever that is the model before training: TRL would keep a copy of the adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer
from trl import DPOTrainer, KTOTrainer, RewardTrainer

from scalora.config import changes_the_base
from scalora.rivals.method import Method
from scalora.runs.errors import InputError
from scalora.runs.grpo import ResumableGrpo
from scalora.runs.head_rate import RatedHead
from scalora.runs.messages import without_message
from scalora.runs.settings import Settings
from scalora.runs.tasks import CLASSES

_COPY = "ref"  # what TRL calls its copy of an adapter


class _OverExamples(Trainer):  # type: ignore[misc]
    """The metrics that a TRL trainer logs of an evaluation, as means over examples."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batches: list[dict[str, float]] = []  # number of examples in the batches of an evaluation

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As TRL does; remembers how many examples the batch has.

        Args:
            model: the model.
            inputs: a batch.
            *args: further arguments of TRL's method.
            **kwargs: the same by name.
        """
        self._batches.append(self._counted(inputs))
        return super().prediction_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As TRL does, but with means over examples.

        Args:
            logs: the values to log.
            *args: further arguments of TRL's method.
            **kwargs: the same by name.
        """
        batches, self._batches = self._batches, []
        metrics = self._lists() if batches else {}
        for name, values in metrics.items():
            counts = [batch.get(name.rpartition("/")[2], batch[""]) for batch in batches]
            counts = [count for count in counts if count]
            if len(values) == len(counts) and all(isinstance(value, (int, float)) for value in values):
                mean = sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)
                metrics[name] = [mean]
        self._derive(metrics)
        super().log(logs, *args, **kwargs)

    def _counted(self, inputs: Any) -> dict[str, float]:
        """The number of examples in a batch, and by the last part of their names those of metrics of some of them."""
        if isinstance(inputs, list):
            return {"": len(inputs)}
        return {"": len(next(value for value in inputs.values() if isinstance(value, (Tensor, list))))}

    def _lists(self) -> dict[str, list[Any]]:
        """The metrics of the evaluation, by batch."""
        lists: dict[str, list[Any]] = self._metrics["eval"]
        return lists

    def _derive(self, metrics: dict[str, list[Any]]) -> None:
        """Compute the metrics that are no means themselves."""


class _Dpo(_OverExamples, DPOTrainer):  # type: ignore[misc]
    pass


class _Kto(_OverExamples, KTOTrainer):  # type: ignore[misc]
    def _counted(self, inputs: Any) -> dict[str, float]:
        labels = torch.as_tensor(inputs["label"])
        good = int(labels.sum())
        return {"": len(labels), "chosen": good, "rejected": len(labels) - good}

    def _derive(self, metrics: dict[str, list[Any]]) -> None:
        chosen, rejected = metrics.get("rewards/chosen"), metrics.get("rewards/rejected")
        if chosen and rejected:
            metrics["rewards/margins"] = [chosen[0] - rejected[0]]


class _Reward(_OverExamples, RatedHead, RewardTrainer):  # type: ignore[misc]
    pass


class _Grpo(_OverExamples, ResumableGrpo):
    pass


def _orpo() -> type[Trainer]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it may change: what it was checked with is said above
        parent: Any = getattr(import_module(CLASSES["orpo"].module), CLASSES["orpo"].trainer)

    class Orpo(_OverExamples, parent):  # type: ignore[misc]
        def _lists(self) -> dict[str, list[Any]]:
            lists: dict[str, list[Any]] = self._stored_metrics["eval"]
            return lists

    return Orpo


def trl_trainer(settings: Settings, method: type[Method], rewards: list[Callable[..., Any]]) -> Callable[..., Trainer]:
    """What makes a trainer for one of the tasks, with the arguments of TRL's class for it.

    Args:
        settings: the run's settings, for the task and the head's learning rate.
        method: the class of the run's method, which says what the model was before training.
        rewards: for GRPO, the functions that reward answers.
    """
    classes: dict[str, Callable[..., Trainer]] = {
        "dpo": _Dpo,
        "kto": _Kto,
        "reward": partial(_Reward, head_rate=settings.head_learning_rate),
        "grpo": partial(_Grpo, reward_funcs=rewards),
    }
    cls = _orpo() if settings.task == "orpo" else classes[settings.task]

    def make(model: nn.Module, **options: Any) -> Trainer:
        _end_starts(model)
        try:
            # It would say that it has set what it needs.
            with without_message("trl.experimental.orpo.orpo_trainer", "you should set `remove_unused_columns=False`"):
                trainer = cls(model, **options)
        except (NotImplementedError, TypeError) as error:
            raise InputError(f"task {settings.task!r}: {error}") from error
        if method.before_training == "without_adapter":
            forget_copy(model)
        return trainer

    return make


def _end_starts(model: nn.Module) -> None:
    """Have adapters that are made of a model's configurations start at zero.

    TRL makes its copy for reference so, and copies the factors afterwards. A start that changes the base, as PiSSA's,
    would take the next singular vectors out of it.
    """
    for config in getattr(model, "peft_config", {}).values():
        if changes_the_base(getattr(config, "init_lora_weights", True)):
            config.init_lora_weights = True


def forget_copy(model: nn.Module) -> None:
    """Delete the copy of an adapter that TRL has made for reference, so that it is the model without its adapter.

    Args:
        model: the model that TRL's trainer was given; modified if there is a copy.
    """
    if isinstance(model, PeftModel) and _COPY in model.peft_config:
        model.delete_adapter(_COPY)
