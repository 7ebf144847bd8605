"""The run folder: what was asked, on what it ran, what came out. Every file appears whole or not at all."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scalora.cli.errors import InputError
from scalora.cli.settings import Settings

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


def continue_run_folder(settings: Settings, step: int) -> Path:
    """Go on with an earlier run's folder from a checkpoint: drop the metrics of steps that will be taken again.

    Raises:
        InputError: the run was of another model, task, method or data, or with other settings of the adapter.
    """
    folder = Path(settings.output_dir)
    try:
        earlier = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"output_dir {str(folder)!r} holds no run to resume: {error}") from None
    now = settings.model_dump()
    for key in ("model", "task", "method", "dtype", "quantization", "data", "lora", "scalora"):
        if (before := (earlier or {}).get(key)) != now[key]:
            raise InputError(f"{key}={now[key]!r}, but the run to resume has {before!r}: resume with its own settings")
    metrics = folder / "metrics.jsonl"
    if metrics.is_file():
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        _replace_text(metrics, "".join(line for line in lines if _step(line) <= step))
    return folder


def _step(line: str) -> float:
    """Of a line of metrics; one that was cut off in the middle belongs to no step that counts."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def trainer_folder(settings: Settings) -> Path:
    """Where the Trainer puts files of its own."""
    return Path(settings.output_dir) / _TRAINER


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON atomically."""
    _replace_text(path, json.dumps(content, indent=2) + "\n")


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a temporary folder beside `path`, then rename it into place, instead of one that is there."""
    temporary, earlier = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.earlier")
    for leftover in (temporary, earlier):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    if path.exists():
        path.rename(earlier)
    temporary.rename(path)
    shutil.rmtree(earlier, ignore_errors=True)


class MetricsFile(TrainerCallback):  # type: ignore[misc]
    """Appends every log event of a Trainer to ``metrics.jsonl``, one JSON object a line."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Write one line; it is on disk when the next step begins."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


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
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
