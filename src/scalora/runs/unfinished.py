"""What a run that has not come to its end says of itself, and how to go on with it."""

from __future__ import annotations

import json
from pathlib import Path

from scalora.runs.run_folder import CONFIG_FILE, ENVIRONMENT_FILE, STOPPED_FILE, SUMMARY_FILE, TRAINER
from scalora.saving.checkpoints import last_checkpoint


def is_unfinished(folder: Path) -> bool:
    """Whether a folder is that of a run that has not come to its end.

    Args:
        folder: the folder; need not exist.
    """
    begun = all((folder / name).is_file() for name in (CONFIG_FILE, ENVIRONMENT_FILE))
    return begun and not (folder / SUMMARY_FILE).is_file()


def how_to_go_on(folder: Path) -> str:
    """How far an unfinished run has come, and what can be done with it: a sentence that begins with "it".

    Args:
        folder: the run folder.
    """
    trainer = folder / TRAINER
    checkpoint = last_checkpoint(trainer)
    if checkpoint is not None:
        way = f"`scalora train CONFIG --resume` goes on from {str(checkpoint)!r}, which can be exported too"
    else:
        some = any(trainer.glob("checkpoint-*"))
        none = f"whole checkpoint in {str(trainer)!r}" if some else "checkpoint (training.save_strategy saves some)"
        way = f"there is no {none}: train anew with `scalora train CONFIG --overwrite`"
    return f"it is not finished{_how_it_stopped(folder)}: {way}"


def _how_it_stopped(folder: Path) -> str:
    """What the run said of it, in brackets; nothing if it could say nothing."""
    try:
        stopped = json.loads((folder / STOPPED_FILE).read_text(encoding="utf-8"))
        return f" (stopped at step {stopped['step']:,}: {stopped['reason']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
