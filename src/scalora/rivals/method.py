"""`Method`: the interface between `scalora train` and a fine-tuning method. The base class is plain LoRA.

LoRA is PEFT's (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainingArguments

from scalora.config import DEFAULT_LEARNING_RATE

Backward = Callable[[nn.Module], None]
"""Runs a few training batches forward and backward through a model, which accumulates gradients in its parameters."""

BeforeTraining = Literal["without_adapter", "start", "copy", "lost"]
"""Where the model before training can be found in a run."""


@dataclass(frozen=True)
class Method:
    """Plain LoRA. Other methods are subclasses that override what they do differently.

    The dataclass fields of a subclass are the options that a config's ``method_options`` takes.
    """

    learning_rate: ClassVar[float | None] = DEFAULT_LEARNING_RATE
    """Default learning rate. None: the default of the training arguments' class."""

    ordinary_adapter: ClassVar[bool] = True
    """Whether the adapter that `save_pretrained` writes, on the original base, is the trained model."""

    trains_its_adapter: ClassVar[bool] = True
    """Whether what is trained are the factors of the adapter that `save_pretrained` writes, and a step is theirs."""

    steps_entries: ClassVar[bool] = True
    """Whether training is steps of single entries and nothing else, so that it is the same with flat copies of what is
    trained, which DeepSpeed steps."""

    cannot_resume: ClassVar[str | None] = None
    """The reason why a run can't resume from a checkpoint. None: it can."""

    before_training: ClassVar[BeforeTraining] = "without_adapter"
    """What the model before training is, which DPO, KTO and GRPO compare the trained one with. without_adapter: the
    model without its adapter. start: the model with the adapter as it starts, because the start is taken off the base.
    copy: another model, because there is no adapter. lost: nowhere, because training changes the base, or because TRL
    can't handle the adapter."""

    def training_defaults(self) -> dict[str, Any]:
        """Training arguments that the method needs. Those of the user's config take precedence.

        Raises:
            ImportError: a package that the method needs is not installed.
        """
        return {}

    def peft_config(self, settings: dict[str, Any]) -> PeftConfig | None:
        """The configuration of the method's adapter.

        Args:
            settings: fields of `peft.LoraConfig`: those under ``lora:`` in the user's config, and ``task_type``.

        Returns:
            The configuration for PEFT; None if the method needs none because it trains without an adapter.

        Raises:
            TypeError: the method's adapter has no such field.
            ValueError: a field has an invalid value.
        """
        return LoraConfig(**settings)

    def adapt(
        self, model: nn.Module, config: PeftConfig | None, backward: Backward, learning_rate: float | None = None
    ) -> nn.Module:
        """Make a model trainable.

        Args:
            model: the base model, which is modified.
            config: the configuration of the adapter, from `peft_config`.
            backward: computes gradients, for methods whose initialisation needs them.
            learning_rate: the base (unscheduled) learning rate of the training that follows, for methods whose
                initialisation depends on it; None if it is not known.

        Returns:
            The model to train.
        """
        return model if config is None else get_peft_model(model, config)

    def optimizer(self, model: nn.Module, arguments: TrainingArguments) -> Optimizer | None:
        """The method's own optimizer.

        Args:
            model: the model to train, from `adapt`.
            arguments: the training arguments, with the learning rate, betas, epsilon and weight decay.

        Returns:
            The optimizer; None if the Trainer is to create the one of ``training.optim``.
        """
        return None

    def callbacks(self) -> list[TrainerCallback]:
        """Callbacks for the Trainer, one for each model that is trained."""
        return []

    def merged(self, model: nn.Module) -> nn.Module:
        """Merge the adapter into the base.

        Args:
            model: the trained model, which is modified.

        Returns:
            The trained model in the architecture of the base.
        """
        return model.merge_and_unload() if isinstance(model, PeftModel) else model


def require_positive(method: Method) -> None:
    """Check that all options of a method that are numbers are positive and finite, and integers if their defaults are.

    Args:
        method: the method to check.

    Raises:
        ValueError: an option is not; the message names it.
    """
    for option in fields(method):
        if isinstance(option.default, str):
            continue
        value = getattr(method, option.name)
        whole = isinstance(option.default, int)
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not 0 < value < math.inf:
            kind = "integer" if whole else "finite number"
            raise ValueError(f"{option.name} must be a positive {kind}, got {value!r}")
