"""Runs whose weights are split over processes (FSDP2, DeepSpeed ZeRO-3): who asks for it, and what can't be done then.

A run's config asks for it in ``training.fsdp`` or ``training.deepspeed``, `accelerate launch` in environment variables.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import PartialState
from accelerate.utils import DistributedType, str_to_bool
from transformers import TrainingArguments
from transformers.integrations import deepspeed

from scalora.rivals.method import Method
from scalora.rivals.scalora import ScaLoraMethod
from scalora.runs.errors import InputError
from scalora.runs.optimizer_checks import uses_pair_adamw
from scalora.runs.settings import Settings

_BY_LAUNCHER = "ACCELERATE_USE_FSDP"

# Methods of which all that training changes are the trained parameters of a model that is made again without gradients.
_WRITTEN_FROM_SHARDS = ("lora", "rslora", "block_signs")


def splits_weights(arguments: TrainingArguments) -> bool:
    """Whether each process of a run has only a part of every weight while it trains.

    Args:
        arguments: the trainer's arguments.
    """
    plugin = arguments.deepspeed_plugin
    return _fsdp(arguments) is not None or (plugin is not None and plugin.zero_stage == 3)


def check_sharding(settings: Settings, method: Method, arguments: TrainingArguments) -> None:
    """Check that what a config asks for can be done with weights that are split over processes.

    Args:
        settings: the run's settings.
        method: the fine-tuning method.
        arguments: the trainer's arguments.

    Raises:
        InputError: it can't; names the key.
    """
    given, plugin = settings.training.get("deepspeed"), arguments.deepspeed_plugin
    if plugin is None:
        if (how := _fsdp(arguments)) is None:
            return
    else:
        how = f"training.deepspeed={given!r}" if given else f"DeepSpeed ZeRO-{plugin.zero_stage} of `accelerate launch`"
        if not method.steps_entries:
            raise InputError(
                f"method={settings.method!r} with {how}: DeepSpeed steps flat copies of what is trained, and the "
                "method is about matrices; leave it out, and train with DistributedDataParallel"
            )
        if uses_pair_adamw(settings, method):
            raise InputError(
                f"the optimizer PairAdamW with {how}: DeepSpeed steps flat copies of what is trained, and PairAdamW is "
                "about pairs of factors; set training.optim to adamw_torch, or train with FSDP2 or "
                "DistributedDataParallel"
            )
    if isinstance(method, ScaLoraMethod) and arguments.load_best_model_at_end:
        raise InputError(
            f"training.load_best_model_at_end=True with {how}: the Trainer would load the best adapter onto the base "
            "weights of the last step; set it to false, and export the best checkpoint of the folder trainer afterwards"
        )
    if not splits_weights(arguments):
        return
    if not isinstance(method, ScaLoraMethod) and settings.method not in _WRITTEN_FROM_SHARDS:
        raise InputError(
            f"method={settings.method!r} with {how}: of the methods only scalora, its controls, "
            f"{', '.join(_WRITTEN_FROM_SHARDS)} write what they have trained from shards; leave it out, and train with "
            "DistributedDataParallel"
        )
    if settings.track_updates not in (0, "auto"):
        raise InputError(
            f"track_updates={settings.track_updates!r} with {how}: no process has whole weights to measure; set it to "
            "0, and measure afterwards with `scalora inspect`"
        )
    if _fsdp(arguments) is not None:
        _check_fsdp(how, arguments)


def check_processes(arguments: TrainingArguments) -> None:
    """Check that the processes of a run can split its weights as its config asks.

    Args:
        arguments: the trainer's arguments.

    Raises:
        InputError: there is one process, or they have no GPUs.
    """
    if (how := _fsdp(arguments)) is None:
        return
    kind = PartialState().distributed_type
    if kind is DistributedType.NO:
        raise InputError(
            f"{how} splits the weights over several processes, and this is one: start them with `torchrun "
            "--nproc-per-node N -m scalora train CONFIG` or `accelerate launch`"
        )
    if kind is DistributedType.MULTI_CPU:
        raise InputError(
            f"{how}: Accelerate splits weights over GPUs alone, and would train a whole model in each of these "
            "processes on CPUs; leave it out"
        )


def measures_updates(settings: Settings, arguments: TrainingArguments) -> bool:
    """Whether a run measures the rank of its update while it trains; warns if it can't.

    Args:
        settings: the run's settings.
        arguments: the trainer's arguments.
    """
    if settings.track_updates and splits_weights(arguments):
        warnings.warn(
            "track_updates: the rank of the update is not measured, because no process has whole weights; `scalora "
            "inspect` measures it afterwards",
            stacklevel=2,
        )
        return False
    return bool(settings.track_updates)


@contextmanager
def models_are_loaded_whole(arguments: TrainingArguments) -> Iterator[None]:
    """Context manager in which Transformers loads a whole model in this process, also in a run with ZeRO-3.

    Its settings, as long as they are there, have `from_pretrained` split the weights, which takes all processes.

    Args:
        arguments: the trainer's arguments.
    """
    # Accelerate has its own copy, which alone is there if `accelerate launch` asks for DeepSpeed.
    config = getattr(arguments.deepspeed_plugin, "dschf", None) or getattr(arguments, "hf_deepspeed_config", None)
    if config is None:
        yield
        return
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(config)


def _fsdp(arguments: TrainingArguments) -> str | None:
    """What asks for FSDP; None if nothing does."""
    if arguments.fsdp:
        return f"training.fsdp={arguments.fsdp!r}"
    if str_to_bool(os.environ.get(_BY_LAUNCHER, "false")):
        return f"{_BY_LAUNCHER}=true of `accelerate launch`"
    return None


def _check_fsdp(how: str, arguments: TrainingArguments) -> None:
    if arguments.fsdp:
        key, version = "training.fsdp_config.fsdp_version", (arguments.fsdp_plugin_args or {}).get("fsdp_version")
    else:
        key, version = "FSDP_VERSION", int(os.environ.get("FSDP_VERSION", "1"))
    if version != 2:
        raise InputError(f"{how} with {key}={version}: FSDP1 splits weights anywhere, not by rows; set it to 2")
