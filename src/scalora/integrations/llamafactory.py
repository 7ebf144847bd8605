"""ScaLoRA in LLaMA-Factory: `run_exp`, and ``python -m scalora.integrations.llamafactory CONFIG`` for its ``train``.

LLaMA-Factory has no hook for other packages, but its `run_exp` takes callbacks. Checked with LLaMA-Factory 0.9.5; an
import of this module needs it, scalora does not.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from llamafactory.hparams import read_args
from llamafactory.train import tuner
from transformers import TrainerCallback

from scalora.integrations.plugin import PluginSettings, leave_an_ordinary_adapter

_BLOCK = "scalora"

# What computes the adapted layers itself, and so misses a remainder, or replaces the training loop.
_OWN_LAYERS = ("use_unsloth", "use_kt", "use_mca", "use_hyper_parallel")


def run_exp(args: dict[str, Any] | None = None, callbacks: list[TrainerCallback] | None = None) -> None:
    """LLaMA-Factory's `run_exp` with ScaLoRA.

    Examples:
        >>> run_exp({"stage": "sft", "finetuning_type": "lora", ..., "scalora": {"interval": 10}})

    Args:
        args: LLaMA-Factory's arguments, and in ``scalora`` the settings of ScaLoRA: fields of `ScaLoraConfig`, and
            ``optimizer: pair_adamw``; or ``method: block_signs``. None: those of the command line, as LLaMA-Factory
            reads them.
        callbacks: other callbacks.

    Raises:
        ValueError: a setting is wrong, or the arguments ask for what ScaLoRA can't do. One line.
    """
    _run(*_checked(read_args(args)), callbacks)


def main() -> None:
    """LLaMA-Factory's ``train``, with the arguments of the command line."""
    try:
        given, settings = _checked(read_args(None))
    except ValueError as error:
        sys.exit(str(error))
    _run(given, settings, None)


def _checked(args: Any) -> tuple[dict[str, Any], PluginSettings]:
    """LLaMA-Factory's arguments without ScaLoRA's block, and its settings."""
    if not isinstance(args, dict):
        raise ValueError("give a YAML or JSON file of LLaMA-Factory's arguments, and overrides as key=value after it")
    given = dict(args)
    settings = PluginSettings.from_block(given.pop(_BLOCK, None), _BLOCK)
    if (kind := given.get("finetuning_type", "lora")) != "lora":
        raise ValueError(f"finetuning_type: {kind} has no LoRA adapter for ScaLoRA to train: set finetuning_type: lora")
    if own := [key for key in _OWN_LAYERS if given.get(key)]:
        raise ValueError(f"{own[0]}: true brings layers of its own, which miss ScaLoRA's remainder: leave it out")
    if not given.get("output_dir"):
        raise ValueError("output_dir is not set: name the folder to train into")
    return given, settings


def _run(given: dict[str, Any], settings: PluginSettings, callbacks: list[TrainerCallback] | None) -> None:
    tuner.run_exp(given, callbacks=[*(callbacks or []), settings.callback()])
    leave_an_ordinary_adapter(Path(given["output_dir"]))


if __name__ == "__main__":
    main()
