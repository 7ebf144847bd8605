"""Builds a run's optimizer and schedule over one small parameter: what can't be built is found before loading a model.

The Trainer builds them only when training begins.
"""

from __future__ import annotations

import torch
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments, get_scheduler

from scalora.rescale.optimizers import state_degrees
from scalora.rivals.full_weights import GaLore
from scalora.rivals.method import Method
from scalora.rivals.scalora import ScaLoraMethod
from scalora.runs.errors import InputError
from scalora.runs.settings import Settings

# Optimizers that Transformers builds only for a model.
_NEED_A_MODEL = ("galore", "apollo", "lomo", "adalomo")

# What a method that brings an optimizer of its own is built on.
_ADAMW = ("adamw_torch", "adamw_torch_fused")


def check_optimizer(settings: Settings, method: Method, arguments: TrainingArguments) -> None:
    """Check the optimizer and the learning rate's schedule.

    Args:
        settings: the run's settings.
        method: the fine-tuning method.
        arguments: the trainer's arguments.

    Raises:
        InputError: one of them can't be built, or would be replaced by the method's own.
        UnsupportedOptimizerError: ScaLoRA can't carry the optimizer's state.
    """
    name = str(getattr(arguments.optim, "value", arguments.optim))
    parameter = torch.nn.Parameter(torch.zeros(1, 1))
    optimizer: Optimizer = torch.optim.AdamW([parameter])
    if type(method).optimizer is not Method.optimizer:
        if "optim" in settings.training and name not in _ADAMW and not isinstance(method, GaLore):
            raise InputError(
                f"training.optim={name!r}: the method {settings.method!r} brings an optimizer of its own; leave it out"
            )
    elif not name.startswith(_NEED_A_MODEL) or isinstance(method, ScaLoraMethod):
        try:
            cls, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments)
            optimizer = cls([{"params": [parameter], "weight_decay": arguments.weight_decay}], **keywords)
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"training.optim={name!r}: {error}") from None
    if isinstance(method, ScaLoraMethod):
        state_degrees(optimizer)
    _check_schedule(arguments, optimizer)


def _check_schedule(arguments: TrainingArguments, optimizer: Optimizer) -> None:
    try:
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),
        )
    except (ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        name = getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)
        given = arguments.lr_scheduler_kwargs
        raise InputError(f"training.lr_scheduler_type={name!r} with lr_scheduler_kwargs={given!r}: {error}") from None
