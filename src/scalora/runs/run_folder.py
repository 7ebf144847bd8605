"""The run folder: what was asked, on what it ran, what came out. Every file appears whole or not at all."""

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
    """Find out before any work whether the folder can be written; changes nothing.

    Raises:
        InputError: it exists with something in it and `overwrite` is not given, or it is not a run folder.
    """
    folder = Path(settings.output_dir)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"output_dir {str(folder)!r} is a file")
    content = {path.name for path in folder.iterdir()} - {_TRAINER}
    if content and not overwrite:
        raise InputError(f"output_dir {str(folder)!r} is not empty: choose another or add --overwrite")
    if content and "config.yaml" not in content:
        raise InputError(f"output_dir {str(folder)!r} is not a run folder: not overwriting it")


def create_run_folder(settings: Settings) -> Path:
    """Make the folder with ``config.yaml`` and ``environment.json``, in place of an earlier run's."""
    folder = Path(settings.output_dir)
    shutil.rmtree(folder, ignore_errors=True)
    trainer_folder(settings).mkdir(parents=True)
    _replace_text(folder / "config.yaml", yaml.safe_dump(settings.model_dump(), sort_keys=False, allow_unicode=True))
    write_json(folder / "environment.json", _environment(settings))
    return folder


def check_resumable(settings: Settings) -> None:
    """Find out before any work whether an earlier run's folder can be gone on with; changes nothing.

    Raises:
        InputError: there is none, or it is of another model, task, method or data, or of other settings of the adapter.
    """
    earlier, now = run_settings(Path(settings.output_dir)).model_dump(), settings.model_dump()
    for key in ("model", "task", "method", "method_options", "dtype", "quantization", "data", "lora", "scalora"):
        if (before := earlier[key]) != now[key]:
            raise InputError(f"{key}={now[key]!r}, but the run to resume has {before!r}: resume with its own settings")


def trainer_folder(settings: Settings) -> Path:
    """Where the Trainer puts files of its own."""
    return Path(settings.output_dir) / _TRAINER


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON atomically."""
    _replace_text(path, json.dumps(content, indent=2) + "\n")


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, without one that a kill has cut off; none of a file that is not there."""
    objects = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            objects.append(json.loads(line))
        except ValueError:
            continue
    return objects


class MetricsFile(TrainerCallback):  # type: ignore[misc]
    """Appends every log event of a Trainer to ``metrics.jsonl``, one JSON object a line."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the metrics of steps that will be taken again: only now that a checkpoint has been loaded."""
        if self._path.is_file():
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            _replace_text(self._path, "".join(line for line in lines if _step(line) <= state.global_step))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Write one line; it is on disk when the next step begins."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


def _step(line: str) -> float:
    """Of a line of metrics; one that was cut off in the middle belongs to no step that counts."""
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
