"""What the hub says of a model without its weights: its config, its size, and whether it is gated."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, model_info

_PATIENCE = 5.0  # seconds to wait for an answer
_WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True)
class Hub:
    """What is known of a model.

    Attributes:
        config: the keys of its config.json; None if it can't be read.
        size: bytes of its weights; None if unknown.
        gated: whether its licence is to be accepted; None if unknown.
    """

    config: dict[str, Any] | None = None
    size: int | None = None
    gated: bool | None = None

    def left_to_load(self, model: str, guess: int) -> int:
        """Bytes that are still to be downloaded.

        Args:
            model: hub id.
            guess: bytes of the weights if the hub does not say.
        """
        folder = Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}" / "blobs"
        there = sum(path.stat().st_size for path in folder.glob("*") if path.is_file())
        return max(0, (guess if self.size is None else self.size) - there)


@lru_cache(maxsize=32)
def ask(model: str) -> Hub:
    """Ask the hub about a model; without an answer, nothing is known.

    Args:
        model: hub id.
    """
    try:
        info = model_info(model, timeout=_PATIENCE, files_metadata=True)
    except Exception:  # whatever keeps the hub from answering
        return Hub()
    sizes: dict[str, int] = dict.fromkeys(_WEIGHTS, 0)
    for file in info.siblings or ():
        for suffix in _WEIGHTS:
            # Some repositories hold the weights a second time, in folders of other formats.
            if file.rfilename.endswith(suffix) and "/" not in file.rfilename:
                sizes[suffix] += file.size or 0
    size = next((sizes[suffix] for suffix in _WEIGHTS if sizes[suffix]), None)
    try:
        path = hf_hub_download(model, "config.json", etag_timeout=_PATIENCE)
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except Exception:  # of a gated model it can't be read without a token
        config = None
    return Hub(config, size, bool(info.gated))
