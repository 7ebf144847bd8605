"""LoRA whose update has block signs: `scalora.add_block_signs`. Not from a paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from peft import PeftConfig
from torch import nn

from scalora.block_signs import add_block_signs, check_blocks
from scalora.rivals.method import Backward, Method
from scalora.rivals.own_update import starting_at_zero


@dataclass(frozen=True)
class BlockSigns(Method):
    """LoRA whose update has block signs, and ``blocks`` times the rank. Its settings under ``lora:`` are LoRA's.

    Raises:
        ValueError: `blocks` is not a power of two above 1.
    """

    trains_its_adapter: ClassVar[bool] = False

    blocks: int | None = None
    """Number of parts of each side of an update, a power of two. None: the largest with which its rank is at most 256,
    32 at r = 8; at least 2."""

    def __post_init__(self) -> None:
        check_blocks(self.blocks)

    def peft_config(self, settings: dict[str, Any]) -> PeftConfig | None:
        """LoRA's configuration.

        Args:
            settings: fields of `peft.LoraConfig`.

        Raises:
            ValueError: ``init_lora_weights`` is not True. Other starts are none with signs.
        """
        return starting_at_zero(settings, "LoRA with block signs")

    def adapt(
        self, model: nn.Module, config: PeftConfig | None, backward: Backward, learning_rate: float | None = None
    ) -> nn.Module:
        """Add PEFT's LoRA layers, and signs to their updates.

        Args:
            model: the base model, which is modified.
            config: the configuration of the adapter, from `peft_config`.
            backward: not used.
            learning_rate: not used.

        Returns:
            The model to train.

        Raises:
            UnsupportedLayerError: a layer has an option of LoRA that block signs do not go with.
        """
        adapted = super().adapt(model, config, backward)
        add_block_signs(adapted, self.blocks)
        return adapted
