"""`Method`: all that the training command has to know of a fine-tuning method. The base class is plain LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainingArguments

Backward = Callable[[nn.Module], None]
"""Runs a few training batches forward and backward through a model, so that its parameters have gradients."""


@dataclass(frozen=True)
class Method:
    """Plain LoRA (Hu et al., arXiv:2106.09685); another method overrides what it does otherwise.

    A method's dataclass fields are the options that a config's ``method_options`` takes.
    """

    learning_rate: ClassVar[float | None] = 1e-3
    """The default; None is the library's own. The libraries' 2e-5 and 5e-5 are for full fine-tuning and leave an
    adapter where it was; of 1e-3, 2e-3 and 4e-3 this is the best or within noise of it on the measured tasks
    (docs/defaults.md)."""

    ordinary_adapter: ClassVar[bool] = True
    """Whether what `save_pretrained` writes is right on the original base, so that it may be shipped."""

    cannot_resume: ClassVar[str | None] = None
    """Why a run can't go on from a checkpoint; None where it can."""

    def training_defaults(self) -> dict[str, Any]:
        """Training arguments that the method needs; the user's own win."""
        return {}

    def peft_config(self, settings: dict[str, Any]) -> PeftConfig | None:
        """The adapter for the fields under ``lora:`` in a config (task_type included); None to train without one.

        Raises:
            TypeError, ValueError: a field that the method's adapter does not have, or a wrong value.
        """
        return LoraConfig(**settings)

    def adapt(self, model: nn.Module, config: PeftConfig | None, backward: Backward) -> nn.Module:
        """Make the model trainable; `backward` is for methods whose start needs gradients."""
        return model if config is None else get_peft_model(model, config)

    def optimizer(self, model: nn.Module, arguments: TrainingArguments) -> Optimizer | None:
        """An optimizer of the method's own; None leaves it to the Trainer (``training.optim``)."""
        return None

    def callbacks(self) -> list[TrainerCallback]:
        """What has to happen between the Trainer's steps."""
        return []

    def merged(self, model: nn.Module) -> nn.Module:
        """The trained model in the base's own architecture."""
        return model.merge_and_unload() if isinstance(model, PeftModel) else model


def adamw_arguments(arguments: TrainingArguments) -> dict[str, Any]:
    """What a Trainer would give AdamW, for methods that build their own optimizer."""
    return {
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
        "weight_decay": arguments.weight_decay,
    }


def require_positive(method: Method) -> None:
    """Check that a method's options are positive numbers, whole ones where the default is.

    Raises:
        ValueError: one is not.
    """
    for option in fields(method):
        value = getattr(method, option.name)
        whole = isinstance(option.default, int)
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not 0 < value < math.inf:
            kind = "integer" if whole else "finite number"
            raise ValueError(f"{option.name} must be a positive {kind}, got {value!r}")
