"""What makes a resumed run the run that it resumes: the same settings, data and batches, and one record of it all."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset
from transformers import TrainingArguments

from scalora.config import ScaLoraConfig
from scalora.runs.claim import free_name
from scalora.runs.data import Examples
from scalora.runs.errors import InputError
from scalora.runs.run_folder import DIVERGED_FILE, ENVIRONMENT_FILE, STOPPED_FILE, SUMMARY_FILE
from scalora.runs.settings import Settings

# What a run writes at its end, in the order in which it is moved aside: a run without a summary is not finished.
_RESULTS = (SUMMARY_FILE, DIVERGED_FILE, "delta", "adapter", "model")

_PACKAGES = ("scalora", "torch", "transformers", "peft", "trl", "accelerate", "datasets")

# Keys of a config that decide nothing about the steps of training. The others must be those of the run.
_FREE = {"output_dir", "save_model", "track_updates", "evaluate", "needs", "trust_remote_code", "training"}

# Where the folder is decides nothing either, and the training arguments are compared one by one.
_SEEN_ELSEWHERE = {"output_dir", "training"}

# Training arguments that decide nothing about the steps either. What is evaluated, and when, does: evaluation draws
# random numbers, and schedules and the best model may depend on it.
_FREE_IN_TRAINING = {
    "ddp_timeout",
    "debug",
    "disable_tqdm",
    "gradient_accumulation_steps",  # of these two and the number of processes, `check_same_data` checks the product
    "gradient_checkpointing",  # recomputes what it would have kept
    "gradient_checkpointing_kwargs",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "dataset_num_proc",
    "per_device_eval_batch_size",
    "per_device_train_batch_size",
    "project",
    "push_to_hub",
    "report_to",
    "restore_callback_states_from_checkpoint",
    "run_name",
    "skip_memory_metrics",
}
_FREE_PREFIXES = ("hub_", "log_", "logging_", "save_", "trackio_")

_LENGTH = ("max_steps", "num_train_epochs")

# Schedules whose learning rate at a step does not depend on how many steps follow.
_WITHOUT_AN_END = {"constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau"}

# Data up to this size is read through to recognise it; of larger data the rows at both ends are.
_READ_THROUGH = 1 << 30
_ROWS = 10_000


class Change(NamedTuple):
    """A setting that a resumed run has another value of.

    Attributes:
        before: the value of the run.
        now: the value with which it goes on.
    """

    before: Any
    now: Any


def settings_changes(found: Settings, settings: Settings) -> dict[str, Change]:
    """What a resumed run does differently, apart from its training arguments.

    Args:
        found: the settings of the run in the folder.
        settings: the settings to resume with.

    Returns:
        The settings that differ and may, by their keys.

    Raises:
        InputError: the run has another model, task, method or data, or other settings of the adapter.
    """
    before, now = found.model_dump(), settings.model_dump()
    if ScaLoraConfig.from_dict(found.scalora) == ScaLoraConfig.from_dict(settings.scalora):
        before["scalora"] = now["scalora"]
    different = {key: Change(before[key], now[key]) for key in before if before[key] != now[key]}
    for key, change in different.items():
        if key not in _FREE:
            raise _other(key, change)
    return {key: change for key, change in different.items() if key not in _SEEN_ELSEWHERE}


def training_changes(earlier: TrainingArguments, arguments: TrainingArguments) -> dict[str, Change]:
    """The training arguments that a resumed run has other values of.

    Args:
        earlier: the trainer's arguments of the run in the folder.
        arguments: those to resume with.

    Returns:
        The arguments that differ and may, by their dotted keys.

    Raises:
        InputError: one decides about the steps of training, so that the run would be another.
    """
    changes = {}
    for field in dataclasses.fields(arguments):
        key, change = f"training.{field.name}", Change(*(_plain(getattr(a, field.name)) for a in (earlier, arguments)))
        if not field.init or change.before == change.now or field.name == "output_dir":
            continue
        if field.name in _LENGTH:
            _check_longer(key, change)
        elif field.name not in _FREE_IN_TRAINING and not field.name.startswith(_FREE_PREFIXES):
            raise _other(key, change)
        changes[key] = change
    return changes


def is_longer(changes: Mapping[str, Change]) -> bool:
    """Whether a resumed run has more steps than the run that it resumes.

    Args:
        changes: from `training_changes`.
    """
    return any(f"training.{name}" in changes for name in _LENGTH)


def warn_about_the_schedule(arguments: TrainingArguments, step: int) -> None:
    """Warn if the learning rates of a run that is made longer are not those of a run that was as long from the start.

    Args:
        arguments: the trainer's arguments to resume with.
        step: the step that the run resumes at.
    """
    schedule = getattr(arguments.lr_scheduler_type, "value", str(arguments.lr_scheduler_type))
    # From 1 on it is a number of steps, below a share of all steps.
    warmup = float(getattr(arguments, "warmup_ratio", 0) or 0) or float(arguments.warmup_steps or 0) % 1
    if schedule not in _WITHOUT_AN_END or warmup:
        warnings.warn(
            f"the run is made longer: up to step {step} its learning rates ({schedule}) are those of the shorter run, "
            "so it is not the run that would have been as long from the start",
            stacklevel=2,
        )


def check_same_data(folder: Path, environment: Mapping[str, Any]) -> None:
    """Check that a resumed run sees the examples, and as many of them in a step, that the run in the folder saw.

    Args:
        folder: the run folder.
        environment: from `environment_of`, for the run as it would go on.

    Raises:
        InputError: the data have changed, or a step has more or fewer examples.
    """
    before = _recorded(folder)
    for split, now in environment["data"].items():
        if (seen := before.get("data", {}).get(split)) is not None and seen != now:
            raise InputError(
                f"data.{split} has changed since the run to resume began ({_count(seen)} examples then, "
                f"{_count(now)} now): restore it, or train with --overwrite"
            )
    if before.get("reward") != environment.get("reward"):
        raise InputError(
            "the file of reward.file has changed since the run to resume began: restore it, or train with --overwrite"
        )
    key = "examples_per_step"
    if (seen := before.get(key)) is not None and seen != environment[key]:
        raise InputError(
            f"a step would have {environment[key]} examples, but had {seen} in the run to resume: use as many "
            "processes and GPUs as it did, or set training.per_device_train_batch_size or "
            "training.gradient_accumulation_steps so that it has as many"
        )


def environment_of(
    settings: Settings, examples: Mapping[str, Examples], arguments: TrainingArguments, *, streams: bool = False
) -> dict[str, Any]:
    """Where, with what and on what a run trains: the content of ``environment.json``.

    Args:
        settings: the run's settings.
        examples: the examples by split, as they were loaded.
        arguments: the trainer's arguments.
        streams: whether the training examples are the first ones of a stream.
    """
    per_process = arguments.train_batch_size * arguments.gradient_accumulation_steps
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "seed": settings.training.get("seed", 42),
        "data_seed": settings.training.get("data_seed"),
        "processes": arguments.world_size,
        "examples_per_step": per_process * arguments.world_size,
        "data": {
            split: {
                "first_examples" if streams and split == "train" else "examples": len(rows),
                "sha256": _digest(rows),
            }
            for split, (rows, _) in examples.items()
        },
    }


def resumed_environment(
    folder: Path, environment: Mapping[str, Any], step: int, changes: Mapping[str, Change]
) -> dict[str, Any]:
    """The ``environment.json`` of a run that is resumed: that of its beginning, how it stopped, and how it went on.

    Args:
        folder: the run folder.
        environment: from `environment_of`, for the run as it goes on.
        step: the step that it resumes at.
        changes: from `settings_changes` and `training_changes`.
    """
    before = _recorded(folder) or dict(environment)
    stopped = _content(folder / STOPPED_FILE)
    going_on = {
        "step": step,
        "command": environment["command"],
        "versions": environment["versions"],
        "changed": {key: list(change) for key, change in changes.items()},
        **({"stopped": stopped} if stopped else {}),
    }
    return before | {"resumed": [*before.get("resumed", []), going_on]}


def set_results_aside(folder: Path) -> None:
    """Move what an earlier end of the run has written into a folder ``results.earlier-N``; nothing if there is none.

    Args:
        folder: the run folder.
    """
    results = [folder / name for name in _RESULTS if os.path.lexists(folder / name)]
    if not results:
        return
    aside = free_name(folder / "results", "earlier")
    aside.mkdir()
    for path in results:
        path.rename(aside / path.name)
    print(f"the results so far are now in {str(aside)!r}", file=sys.stderr)


def _count(data: Mapping[str, Any]) -> str:
    """How many examples a run has seen of its data before it trained."""
    return f"first {data['first_examples']}" if "first_examples" in data else str(data.get("examples"))


def _other(key: str, change: Change) -> InputError:
    return InputError(
        f"{key}={change.now!r}, but the run to resume has {change.before!r}: resume with its own settings"
    )


def _check_longer(key: str, change: Change) -> None:
    """Raise `InputError` unless a run is made longer by the same measure."""
    if not (0 < change.before < change.now):
        raise InputError(
            f"{key}={change.now!r}, but the run to resume has {change.before!r}: a run can be resumed with the same "
            "number of steps or epochs, or with more"
        )


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _recorded(folder: Path) -> dict[str, Any]:
    """What the folder's ``environment.json`` holds; empty if there is none."""
    return _content(folder / ENVIRONMENT_FILE)


def _content(path: Path) -> dict[str, Any]:
    """What a JSON file holds; empty if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} can't be read: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{str(path)!r} must hold keys and values, not a {type(content).__name__}")
    return content


def has_changed(folder: Path, split: str, examples: Dataset) -> bool:
    """Whether the examples of a split are others than a run has recorded; False if it has recorded none.

    Args:
        folder: the run folder.
        split: ``"train"`` or ``"eval"``.
        examples: the examples, as `scalora.runs.data.examples_of` loads them.
    """
    recorded = _recorded(folder).get("data", {}).get(split, {}).get("sha256")
    return recorded is not None and recorded != _digest(examples)


def _digest(examples: Dataset) -> str:
    """A hash of the examples: of their values, not of the file that they come from."""
    count = len(examples)
    if examples.data.nbytes > _READ_THROUGH and count > 2 * _ROWS:
        examples = examples.select([*range(_ROWS), *range(count - _ROWS, count)])
    digest = hashlib.sha256()
    for table in examples.with_format("arrow").iter(batch_size=_ROWS):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as stream:
            stream.write_table(table.replace_schema_metadata())
        digest.update(sink.getvalue())
    return digest.hexdigest()
