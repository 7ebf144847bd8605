"""What vLLM takes of an ordinary adapter. Checked with vLLM 0.32: ``vllm/lora/peft_helper.py`` and ``utils.py``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for ``--max-lora-rank``."""

_HEADS = {"classifier", "score"}  # of classifiers: the only whole modules that an adapter may bring

_NAMED = 3  # tensors that an objection names


def serving_rank(rank: int) -> int:
    """The smallest ``--max-lora-rank`` that accepts an adapter.

    Args:
        rank: the adapter's rank.
    """
    return next((accepted for accepted in MAX_LORA_RANKS if accepted >= rank), rank)


def vllm_objections(folder: Path) -> list[str]:
    """Why vLLM will not load an adapter, if it won't.

    That each adapted layer is one that vLLM adapts in the base's architecture is not checked.

    Args:
        folder: the adapter's folder.

    Returns:
        Clauses that name what it does not take; none if it takes the adapter, with a ``--max-lora-rank`` of at least
        its rank.

    Raises:
        OSError: the adapter can't be read.
    """
    config: dict[str, Any] = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return [f"it is no {SAFETENSORS_WEIGHTS_NAME}"]
    with safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return [*_of_config(config), *_of_tensors(shapes)]


def _of_config(config: Mapping[str, Any]) -> list[str]:
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    heads = sorted(set(config.get("modules_to_save") or ()) - _HEADS)
    found = {
        f"its rank {rank} is above {MAX_LORA_RANKS[-1]}, the largest --max-lora-rank (lower it with --rtol or "
        "--max-rank)": rank > MAX_LORA_RANKS[-1],
        f"it has whole modules (modules_to_save: {', '.join(heads)})": bool(heads),
        f"it has trained biases (bias={config.get('bias')!r})": config.get("bias", "none") != "none",
        "its factors have biases (lora_bias)": bool(config.get("lora_bias")),
        "it repeats layers (layer_replication)": bool(config.get("layer_replication")),
        "it has trained tokens (trainable_token_indices)": bool(config.get("trainable_token_indices")),
    }
    return [clause for clause, holds in found.items() if holds]


def _of_tensors(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    convolutions = sorted({name.rsplit(".lora_", 1)[0] for name, shape in shapes.items() if len(shape) > 2})
    if not convolutions:
        return []
    names = ", ".join(convolutions[:_NAMED]) + (", …" if len(convolutions) > _NAMED else "")
    return [f"it adapts convolutions ({names})"]
