"""ScaLoRA in ms-swift: a file for ``--external_plugins`` calls `register`, and ``--callbacks scalora`` switches it on.

Checked with ms-swift 4.6; an import of this module needs it, scalora does not.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from swift.callbacks import callbacks_map
from swift.tuners import Swift
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scalora.integrations.plugin import PluginSettings, leave_an_ordinary_adapter
from scalora.integrations.transformers import ScaLoraCallback
from scalora.saving.export import load_model
from scalora.saving.state_file import holds_state

_NAME = "scalora"
_from_pretrained = Swift.from_pretrained


def register(**settings: Any) -> None:
    """Register the callback, with the settings of ScaLoRA.

    Examples:
        >>> # scalora_plugin.py, for swift sft --external_plugins scalora_plugin.py --callbacks scalora
        >>> from scalora.integrations.swift import register
        >>> register(interval=10)

    Args:
        settings: fields of `ScaLoraConfig`, and ``optimizer="pair_adamw"`` for `scalora.PairAdamW` instead of
            ms-swift's optimizer, which is the default with ``mode="matrix"``. Or ``method="block_signs"``, and beside
            it ``blocks`` and ``optimizer``.

    Raises:
        ValueError: a name is unknown, or a value is out of range. One line.
    """
    read = PluginSettings.from_block(settings, _NAME)

    def callback(args: Any, trainer: Any) -> TrainerCallback:  # as ms-swift makes callbacks
        if "unsloth" in sys.modules:  # which ms-swift imports for --tuner_backend unsloth alone
            raise ValueError(
                "tuner_backend unsloth brings layers of its own, which miss ScaLoRA's remainder and block signs: use "
                "peft"
            )
        return read.callback() if read.config is None else _SwiftCallback(read.config, pair_adamw=read.pair_adamw)

    callbacks_map[_NAME] = callback
    Swift.from_pretrained = staticmethod(_with_states)


class _SwiftCallback(ScaLoraCallback):
    """Leaves an adapter in the checkpoints that ms-swift leaves as results: the last one and the best one."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_end(args, state, control, **kwargs)
        last = str(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        for folder in {last, state.best_model_checkpoint or last}:
            leave_an_ordinary_adapter(Path(folder))


def _with_states(model: Any, model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
    """`Swift.from_pretrained`, by which ms-swift loads the adapter that it trains further, or resumes with.

    Beside a state that adapter is one of the whole update, of a higher rank than the one that is trained, or none at
    all: the state is loaded in its place.
    """
    if kwargs.get("is_trainable") and holds_state(Path(str(model_id))):
        return load_model(model, model_id)
    return _from_pretrained(model, model_id, *args, **kwargs)
