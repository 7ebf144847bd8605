"""DeepSpeed's own part of a Trainer's checkpoint: whether it is whole, and how many processes have written it.

Every process writes its run of the optimizer's state, and with ZeRO-3 its parts of the model; DeepSpeed looks for those
of the present number of processes alone. Nothing in these files, which are pickles, is loaded here. Checked with
DeepSpeed 0.19.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from scalora.saving.state_file import holds_state, read_state

_FOLDERS = "global_step*"

_MODEL, _OPTIMIZER = "mp_rank_00_model_states.pt", "mp_rank_00_optim_states.pt"


def processes_of_zero(checkpoint: Path) -> int | None:
    """How many processes have written DeepSpeed's part of a checkpoint; None if there is none.

    Args:
        checkpoint: the checkpoint's folder.

    Raises:
        StateError: the state beside it is damaged.
    """
    if not any(checkpoint.glob(_FOLDERS)) or not holds_state(checkpoint):
        return None
    random = read_state(checkpoint).get("random")
    return int(random["process"][1]) if isinstance(random, dict) and "process" in random else None


def flaw_of_zero(checkpoint: Path) -> str | None:
    """What DeepSpeed's part of a checkpoint lacks; None if nothing, or if there is no such part.

    Args:
        checkpoint: the checkpoint's folder.

    Raises:
        StateError: the state beside it is damaged.
    """
    if (count := processes_of_zero(checkpoint)) is None:
        return None
    for folder in checkpoint.glob(_FOLDERS):
        parted = any(folder.glob(f"*zero_pp_rank_*_{_MODEL}"))
        wanted = [f"zero_pp_rank_{rank}_{_OPTIMIZER}" for rank in range(count)]
        wanted += [f"zero_pp_rank_{rank}_{_MODEL}" for rank in range(count)] if parted else [_MODEL]
        for name in wanted:
            # With bf16, DeepSpeed puts that before some names.
            if (path := next(folder.glob(f"*{name}"), None)) is None:
                return f"its {folder.name} has no {name} of {count} processes: it was cut off while it was written"
            if not zipfile.is_zipfile(path):
                return f"its {folder.name}/{path.name} is cut short"
    return None
