"""The run folder: the settings, environment, metrics and results of a run. Every file appears whole or not at all."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scalora.runs.errors import InputError
from scalora.runs.settings import Settings, run_settings
from scalora.saving.files import atomic_write

_TRAINER = "trainer"
_PACKAGES = ("scalora", "torch", "transformers", "peft", "trl", "accelerate", "datasets")


def check_run_folder(settings: Settings, *, overwrite: bool) -> None:
    """Check that a run may write its folder; changes nothing.

    Args:
        settings: the run's settings.
        overwrite: whether to replace an earlier run's folder.

    Raises:
        InputError: the folder is not empty and `overwrite` is False, it is not a run folder, or it can't be written.
    """
    folder = Path(settings.output_dir)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        inside = "" if existing == folder else f" is in {str(existing)!r}, which"
        raise InputError(f"output_dir {str(folder)!r}{inside} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"output_dir {str(folder)!r} can't be written: no permission for {str(existing)!r}")
    if existing != folder:
        return
    content = {path.name for path in folder.iterdir()} - {_TRAINER}
    if content and not overwrite:
        raise InputError(f"output_dir {str(folder)!r} is not empty: choose another or add --overwrite")
    if content and "config.yaml" not in content:
        raise InputError(f"output_dir {str(folder)!r} is not a run folder: not overwriting it")


def create_run_folder(settings: Settings) -> Path:
    """Make the run folder with ``config.yaml`` and ``environment.json``, in place of an earlier run's.

    Args:
        settings: the run's settings.

    Returns:
        The folder.
    """
    folder = Path(settings.output_dir)
    shutil.rmtree(folder, ignore_errors=True)
    trainer_folder(settings).mkdir(parents=True)
    _replace_text(folder / "config.yaml", yaml.safe_dump(settings.model_dump(), sort_keys=False, allow_unicode=True))
    write_json(folder / "environment.json", _environment(settings))
    return folder


def check_resumable(settings: Settings) -> None:
    """Check that the run in the folder can be resumed with these settings; changes nothing.

    Args:
        settings: the settings to resume with.

    Raises:
        InputError: there is no run, or it has another model, task, method or data, or other settings of the adapter.
    """
    earlier, now = run_settings(Path(settings.output_dir)).model_dump(), settings.model_dump()
    for key in ("model", "task", "method", "method_options", "dtype", "quantization", "data", "lora", "scalora"):
        if (before := earlier[key]) != now[key]:
            raise InputError(f"{key}={now[key]!r}, but the run to resume has {before!r}: resume with its own settings")


def trainer_folder(settings: Settings) -> Path:
    """The folder for the Trainer's own files, such as checkpoints.

    Args:
        settings: the run's settings.
    """
    return Path(settings.output_dir) / _TRAINER


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON atomically.

    Args:
        path: file to write.
        content: the object.
    """
    _replace_text(path, json.dumps(content, indent=2) + "\n")


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
        _replace_text(path, "".join(line for line in lines if _step(line) <= step))


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
        drop_later_lines(self._path, state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Write one line, which is on disk before the next step begins."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


def _step(line: str) -> float:
    """The step of a line of metrics; infinity for a line that was cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _environment(settings: Settings) -> dict[str, Any]:
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "seed": settings.training.get("seed", 42),
        "data_seed": settings.training.get("data_seed"),
    }


def _replace_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
