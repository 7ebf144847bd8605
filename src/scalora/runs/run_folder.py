"""The files of a run folder: settings, environment, metrics and results. Each appears whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scalora.runs.errors import InputError
from scalora.runs.settings import Settings
from scalora.saving.files import atomic_write

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
SUMMARY_FILE = "summary.json"
"""Written last: a run that has it is finished."""

DIVERGED_FILE = "diverged.json"
"""Written instead of results and summary by a run that went wrong."""

STOPPED_FILE = "stopped.json"
"""Written by a run that is stopped before its end, as far as it gets to it; gone when the run goes on."""

TRAINER = "trainer"


def trainer_folder(settings: Settings) -> Path:
    """The folder for the Trainer's own files, such as checkpoints.

    Args:
        settings: the run's settings.
    """
    return Path(settings.output_dir) / TRAINER


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically; a number that is NaN or infinite, which JSON does not have, as null.

    Args:
        path: file to write.
        content: the object.
    """
    replace_text(path, json.dumps(as_json(content), indent=2, allow_nan=False) + "\n")


def as_json(value: Any) -> Any:
    """The value with null in place of every number in it that is NaN or infinite.

    Args:
        value: nested mappings and sequences of numbers and texts.
    """
    if isinstance(value, Mapping):
        return {key: as_json(inside) for key, inside in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(inside) for inside in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_output(path: Path, option: str, keys: set[str]) -> None:
    """Check that a file that a command is about to write replaces nothing but an earlier one of its kind.

    Args:
        path: the JSON file to write; need not exist.
        option: the option that names it, for the error.
        keys: keys that all files of its kind have.

    Raises:
        InputError: there is something else.
    """
    if path.is_dir():
        raise InputError(f"{option} {str(path)!r} is a folder: name a file")
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or not keys <= content.keys():
        raise InputError(f"{option} {str(path)!r} is a file that this command has not written: choose another name")


def check_place(path: Path, option: str) -> None:
    """Check, before the work, that a file can be written where it is wanted.

    Args:
        path: the file to write.
        option: the option that names it, for the error.

    Raises:
        InputError: there is no folder to write it in, or it can't be written to.
    """
    folder = path.parent
    if not folder.is_dir():
        raise InputError(f"{option} {str(path)!r}: there is no folder {str(folder)!r}; create it")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{option} {str(path)!r}: the folder {str(folder)!r} can't be written to")


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Args:
        path: file to write.
        text: its content.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, without a line that was cut off; none if there is no file.

    Args:
        path: file of JSON lines.
    """
    objects = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            objects.append(json.loads(line))
        except ValueError:
            continue
    return objects


def drop_later_lines(path: Path, step: int) -> None:
    """Remove the JSON lines of later steps from a file that a resumed run continues; nothing if there is no file.

    Args:
        path: file of JSON lines, each with its ``step``.
        step: last step whose lines are kept.
    """
    if path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        replace_text(path, "".join(line for line in lines if _step(line) <= step))


class MetricsFile(TrainerCallback):  # type: ignore[misc]
    """Appends every log entry of a Trainer to ``metrics.jsonl``, one JSON object per line.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the metrics of steps that a resumed run takes again, now that its checkpoint has been loaded."""
        if state.is_world_process_zero:
            drop_later_lines(self._path, state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Write one line, which is on disk before the next step begins."""
        if state.is_world_process_zero:
            line = as_json({"step": state.global_step, **(logs or {})})
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")


def _step(line: str) -> float:
    """The step of a line of metrics; infinity for a line that was cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
