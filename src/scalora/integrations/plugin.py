"""What the plug-ins for axolotl, ms-swift and LLaMA-Factory share: their settings, and the adapter that they leave."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from scalora.block_signs import check_blocks
from scalora.config import ScaLoraConfig
from scalora.integrations.block_signs import BlockSignsCallback
from scalora.integrations.transformers import ScaLoraCallback
from scalora.parallel.job import is_first
from scalora.saving.errors import StateError
from scalora.saving.export import export_adapter
from scalora.saving.loading import convert_as
from scalora.saving.state import check_content
from scalora.saving.state_file import holds_state, read_state
from scalora.saving.verify import ExportError

_PAIR_ADAMW = "pair_adamw"
_SCALORA, _BLOCK_SIGNS = "scalora", "block_signs"


@dataclass(frozen=True)
class PluginSettings:
    """The settings of a plug-in: a block in the config file of the framework.

    Attributes:
        config: the settings of ScaLoRA; None for block signs in its place.
        pair_adamw: whether `scalora.PairAdamW` replaces the framework's optimizer.
        blocks: the number of blocks, as in `scalora.add_block_signs`.
    """

    config: ScaLoraConfig | None
    pair_adamw: bool
    blocks: int | None = None

    @classmethod
    def from_block(cls, block: Any, key: str = "scalora") -> PluginSettings:
        """Read the settings.

        Args:
            block: the fields of `ScaLoraConfig` to set, by name, and ``optimizer: pair_adamw``, which is the default
                with ``mode: matrix`` because AdamW's state can't be carried there. Or ``method: block_signs``, and
                beside it ``blocks`` and ``optimizer``. None for the defaults.
            key: the name of the block, for errors.

        Raises:
            ValueError: the block is no mapping, a name is unknown, or a value is out of range. One line.
        """
        if not isinstance(block, Mapping | None):
            raise ValueError(f"{key} must be a block of settings, such as `{key}: {{interval: 10}}`, got {block!r}")
        given = {str(name): value for name, value in (block or {}).items()}
        optimizer, method = given.pop("optimizer", None), given.pop("method", _SCALORA)
        if optimizer not in (None, _PAIR_ADAMW):
            raise ValueError(
                f"{key}.optimizer must be {_PAIR_ADAMW}, got {optimizer!r}: leave it out for the framework's optimizer"
            )
        if method not in (_SCALORA, _BLOCK_SIGNS):
            raise ValueError(f"{key}.method must be {_SCALORA} or {_BLOCK_SIGNS}, got {method!r}")
        try:
            if method == _BLOCK_SIGNS:
                return cls(None, pair_adamw=optimizer is not None, blocks=_blocks_of(given))
            config = ScaLoraConfig.from_dict(given)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        return cls(config, pair_adamw=optimizer is not None or config.norm_from_turn)

    def callback(self) -> TrainerCallback:
        """The callback for the Trainer's constructor."""
        if self.config is None:
            return BlockSignsCallback(self.blocks, pair_adamw=self.pair_adamw)
        return ScaLoraCallback(self.config, pair_adamw=self.pair_adamw)


def _blocks_of(given: dict[str, Any]) -> int | None:
    blocks: int | None = given.pop("blocks", None)
    if given:
        raise ValueError(
            f"{next(iter(given))!r} is no setting of block signs, which have no rescales; the settings are blocks and "
            "optimizer"
        )
    check_blocks(blocks)
    return blocks


def leave_an_ordinary_adapter(folder: Path) -> None:
    """After training, give a folder that holds a ScaLoRA state an adapter that PEFT loads on the original base.

    The first process does it, and the others nothing.

    Saving writes one itself where the remainder is factored. A merge into the base leaves a state alone: the base is
    loaded again, as the state says, and the adapter is the difference. Where that can't be done, it warns, so that a
    finished training does not end in an error.

    Args:
        folder: the folder that the model was saved in; nothing is done if it holds no state.
    """
    if not is_first() or not holds_state(folder):
        return
    try:
        state = read_state(folder)
        check_content(state)
        if state["merge"] == "factored":
            return
        base = _base_of(state)
        del state
        with tempfile.TemporaryDirectory(dir=folder, prefix=".adapter-") as temporary:
            export_adapter(base, folder, Path(temporary) / "adapter")
            # The config last: until then, no folder of placeholders and adapter can be loaded.
            written = sorted((Path(temporary) / "adapter").iterdir(), key=lambda file: file.suffix == ".json")
            for file in written:
                os.replace(file, folder / file.name)
    except (StateError, ExportError, OSError, ValueError) as error:
        warnings.warn(
            f"{str(folder)!r} holds ScaLoRA's state and no adapter: {error}. Make one with `scalora export "
            f"{folder} --to adapter`",
            stacklevel=2,
        )


def _base_of(state: Mapping[str, Any]) -> PreTrainedModel:
    """Load the base that a state was trained on, in its dtypes."""
    name, loading = (state["adapter"] or {}).get("base_model_name_or_path"), state.get("loading")
    if not name:
        raise StateError("the state does not name its base")
    if loading is None:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name)
        return model
    base: PreTrainedModel = getattr(transformers, loading["class"], AutoModelForCausalLM).from_pretrained(
        name, dtype=getattr(torch, loading["dtype"])
    )
    convert_as(base, loading["dtypes"])
    return base
