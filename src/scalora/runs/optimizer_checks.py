"""A run's optimizer: which one it has, and whether it and the schedule can be built, before a model is loaded.

The Trainer builds them only when training begins.
"""

from __future__ import annotations

import os

import torch
from accelerate.utils import str_to_bool
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments, get_scheduler

from scalora.integrations.transformers import adamw_arguments
from scalora.maths.mode import Mode
from scalora.model.adapters import LoraPair, find_lora_pairs
from scalora.pair_adamw import PairAdamW
from scalora.rescale.optimizers import state_kinds
from scalora.rivals.full_weights import GaLore
from scalora.rivals.method import Method
from scalora.rivals.scalora import ScaLoraMethod
from scalora.runs.errors import InputError
from scalora.runs.settings import Settings
from scalora.runs.training_defaults import takes_pair_adamw

# Optimizers that Transformers builds only for a model.
_NEED_A_MODEL = ("galore", "apollo", "lomo", "adalomo")

# Set by `accelerate launch`. ZeRO cuts the factors into runs of entries, and PairAdamW needs whole ones.
_DEEPSPEED_BY_LAUNCHER = "ACCELERATE_USE_DEEPSPEED"

# What a method that brings an optimizer of its own is built on.
_ADAMW = ("adamw_torch", "adamw_torch_fused")


# Methods that train plain LoRA pairs with whatever optimizer they are given.
_WITH_PAIR_ADAMW = ("scalora", "lora", "block_signs", "rslora", "pissa", "lora_ga", "normalised_columns")


def default_mode(settings: Settings) -> Mode | None:
    """The mode of ScaLoRA in a run whose config does not say one.

    Args:
        settings: the run's settings.

    Returns:
        ``"matrix"`` where it is the default for the task and the optimizer can be `scalora.PairAdamW`, or is to be it;
        else None, the library's default.
    """
    return "matrix" if settings.optimizer == "pair_adamw" or _pair_adamw_by_default(settings) else None


def _pair_adamw_by_default(settings: Settings) -> bool:
    by_deepspeed = settings.training.get("deepspeed") or str_to_bool(os.environ.get(_DEEPSPEED_BY_LAUNCHER, "false"))
    free = "optim" not in settings.training and not by_deepspeed
    return free and takes_pair_adamw(settings.task, settings.method)


def uses_pair_adamw(settings: Settings, method: Method) -> bool:
    """Whether a run's optimizer is `scalora.PairAdamW`.

    Args:
        settings: the run's settings.
        method: the fine-tuning method.
    """
    if isinstance(method, ScaLoraMethod):
        by_default = method.config.mode == "matrix" and "optim" not in settings.training
    else:
        by_default = _pair_adamw_by_default(settings)
    return settings.optimizer == "pair_adamw" or by_default


def stepped_in_pairs(settings: Settings, method: Method, model: nn.Module) -> list[LoraPair]:
    """The layers whose factors `scalora.PairAdamW` would step; none with another optimizer.

    Args:
        settings: the run's settings.
        method: the fine-tuning method.
        model: the model to train.
    """
    return find_lora_pairs(model, all_shapes=True, signed=True) if uses_pair_adamw(settings, method) else []


def own_optimizer(
    settings: Settings, method: Method, model: nn.Module, arguments: TrainingArguments
) -> Optimizer | None:
    """The optimizer of a run.

    Args:
        settings: the run's settings.
        method: the fine-tuning method.
        model: the model to train.
        arguments: the trainer's arguments.

    Returns:
        The optimizer; None if the Trainer is to build that of ``training.optim``.

    Raises:
        UnsupportedLayerError: a layer is not one that `scalora.PairAdamW` can train.
    """
    if uses_pair_adamw(settings, method):
        return PairAdamW(model, **adamw_arguments(arguments))
    return method.optimizer(model, arguments)


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
    if uses_pair_adamw(settings, method):
        if settings.method not in _WITH_PAIR_ADAMW:
            raise InputError(
                f"optimizer='pair_adamw': the method {settings.method!r} does not train plain LoRA pairs, or brings an "
                f"optimizer of its own; it is for {', '.join(_WITH_PAIR_ADAMW)}"
            )
        if "optim" in settings.training:
            raise InputError(f"optimizer='pair_adamw' and training.optim={name!r}: give one of the two")
        for key in ("optim_args", "optim_target_modules"):
            if settings.training.get(key) is not None:
                raise InputError(
                    f"training.{key}={settings.training[key]!r}: PairAdamW takes none; it is for training.optim, which "
                    "is not set"
                )
        merges = isinstance(method, ScaLoraMethod) and method.config.merge != "factored"
        if merges and settings.quantization is None and arguments.weight_decay:
            raise InputError(
                f"training.weight_decay={arguments.weight_decay}: matrix scaling's optimizer, PairAdamW, pulls weights "
                "towards those of the base, which merges into them do not keep; set it to 0, or scalora.merge to "
                "factored, or scalora.mode to auto, the paper's column scaling with AdamW"
            )
    elif type(method).optimizer is not Method.optimizer:
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
            state_kinds(optimizer, method.config.mode)
            if method.config.norm_from_turn:
                raise InputError(
                    f"scalora.mode='matrix' with training.optim={name!r} needs scalora.target_norm, the norm of the "
                    "orthonormal columns; leave training.optim out for the optimizer pair_adamw, which needs none"
                )
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
