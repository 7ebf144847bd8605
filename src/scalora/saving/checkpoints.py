"""Recognises incomplete checkpoints of a Trainer: a process can be killed at any moment, even while saving."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer_pt_utils import safe_globals

from scalora.saving.errors import StateError
from scalora.saving.state_file import SHARDED_STATE, STATE_FILE, check_state, holds_state
from scalora.saving.zero_files import flaw_of_zero

_NAME = re.compile(r"checkpoint-(\d+)")

_TO_RESUME = ("optimizer.pt", "scheduler.pt")

# What a Trainer with FSDP, and one with DeepSpeed, writes in place of the model's and the optimizer's files, before its
# state. DeepSpeed's has the scheduler in it, if that is DeepSpeed's own.
_OF_SHARDS = {"pytorch_model_fsdp*": ("optimizer.pt",), "global_step*": _TO_RESUME}

# The Trainer writes this file last, so if it is complete, the others have been written too.
WRITTEN_LAST = "trainer_state.json"
"""Where a Trainer's checkpoint says how many steps it has had."""


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The latest complete checkpoint in a Trainer's output folder, for ``resume_from_checkpoint``.

    Later ones that are incomplete or damaged, or hold the model alone, are skipped with a warning.

    Args:
        output_dir: the Trainer's output folder; need not exist.

    Returns:
        The checkpoint's folder; None if there is no complete checkpoint.
    """
    for folder in reversed(_checkpoints(Path(output_dir))):
        if (flaw := why_not_resumable(folder)) is None:
            return folder
        warnings.warn(f"checkpoint {str(folder)!r} is skipped: {flaw}", stacklevel=2)
    return None


def last_finite_checkpoint(output_dir: str | Path) -> Path | None:
    """The latest complete checkpoint in which no weight is NaN or infinite, for a run that has diverged.

    Args:
        output_dir: the Trainer's output folder; need not exist.

    Returns:
        The checkpoint's folder; None if there is none.
    """
    whole = (folder for folder in reversed(_checkpoints(Path(output_dir))) if _flaw(folder) is None)
    return next((folder for folder in whole if _is_finite(folder)), None)


def why_not_resumable(folder: Path) -> str | None:
    """Why training can't go on from a checkpoint; None if it can.

    Args:
        folder: the checkpoint's folder.
    """
    if (flaw := _flaw(folder)) is None and _is_model_only(folder):
        return "it holds the model without the optimizer's state, as save_only_model writes it"
    return flaw


def set_broken_checkpoints_aside(output_dir: Path) -> None:
    """Rename incomplete or damaged checkpoints to ``incomplete-checkpoint-N``, with a warning. Nothing is deleted.

    The Trainer's own search for the last checkpoint then finds a complete one. Finished checkpoints of runs without
    ScaLoRA stay as they are, and so do those of ``save_only_model``, which are whole; but one of FSDP that has no state
    where others have one was cut off before it. One process of a job does this,
    when the job resumes; another may do the same at the same time.

    Args:
        output_dir: the Trainer's output folder; need not exist.
    """
    folders = _checkpoints(output_dir)
    any_state = any(map(holds_state, folders))
    for folder in folders:
        flaw = _flaw(folder)
        cut_off = any_state and any(any(folder.glob(pattern)) for pattern in _OF_SHARDS)
        if flaw is None or ((folder / WRITTEN_LAST).is_file() and not holds_state(folder) and not cut_off):
            continue
        aside = folder.with_name(f"incomplete-{folder.name}")
        number = 1
        while os.path.lexists(aside):
            number += 1
            aside = folder.with_name(f"incomplete-{folder.name}-{number}")
        try:
            folder.rename(aside)
        except FileNotFoundError:
            continue  # another process has done it
        warnings.warn(f"checkpoint {str(folder)!r} is set aside as {aside.name!r}: {flaw}", stacklevel=2)


def _checkpoints(output_dir: Path) -> list[Path]:
    if not output_dir.is_dir():
        return []
    found = {int(m[1]): path for path in output_dir.iterdir() if path.is_dir() and (m := _NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def _is_model_only(folder: Path) -> bool:
    """Whether there is nothing of what ``save_only_model`` leaves out."""
    return not any((folder / name).exists() for name in _TO_RESUME) and not any(folder.glob("rng_state*.pth"))


def _is_finite(folder: Path) -> bool:
    """Whether no tensor of a complete checkpoint has NaN or infinite entries."""
    for path in (*folder.glob("*.safetensors"), *folder.glob(f"{SHARDED_STATE}/**/*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(name)
                # One byte: there are no such operations on float8, which only stores what is quantised.
                if tensor.is_floating_point() and tensor.element_size() > 1 and not tensor.isfinite().all():
                    return False
    return True


def _flaw(folder: Path) -> str | None:
    """Why a folder is not a whole checkpoint; None if it is."""
    try:
        progress = json.loads((folder / WRITTEN_LAST).read_text(encoding="utf-8"))
    except OSError:
        return f"it has no {WRITTEN_LAST}: it was cut off while it was written"
    except ValueError:
        return f"its {WRITTEN_LAST} is cut short"
    if not isinstance(progress, dict) or not isinstance(progress.get("global_step"), int):
        return f"its {WRITTEN_LAST} has no global_step"
    if holds_state(folder):
        try:
            check_state(folder)
            flaw = flaw_of_zero(folder)
        except StateError as error:
            return str(error)
        if flaw is not None:
            return flaw
    elsewhere = {name for pattern, names in _OF_SHARDS.items() if any(folder.glob(pattern)) for name in names}
    if elsewhere and not holds_state(folder):  # which is written after the Trainer's state then
        return (
            f"it has neither {STATE_FILE} nor {SHARDED_STATE}: it was cut off while it was written, or written without "
            "ScaLoRA"
        )
    for path in folder.glob("*.safetensors"):
        if not path.is_file():
            return f"its {path.name} is not a file"
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"its {path.name} is not a complete safetensors file: {error}"
    for name in () if _is_model_only(folder) else _TO_RESUME:
        if not (folder / name).is_file() and name not in elsewhere:
            return f"it has no {name}"
    for path in sorted([*folder.glob("*.pt"), *folder.glob("*.pth")]):
        if not _can_be_loaded(path):
            return f"its {path.name} is cut short or is not a file of tensors"
    return None


def _can_be_loaded(path: Path) -> bool:
    """Whether `torch.load` accepts a file, as the Trainer calls it: without executing anything. Reads no tensors."""
    try:
        with safe_globals():  # allows NumPy's random state, as the Trainer does
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # a damaged file can make the unpickler raise anything
        return False
    return True
