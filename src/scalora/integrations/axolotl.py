"""`ScaloraPlugin`: ScaLoRA in axolotl, from its YAML file.

axolotl's interface for plug-ins is under the Axolotl Community License. It is imported from the installed package.
Checked with axolotl 0.19; an import of this module needs it, scalora does not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, Field
from torch import nn
from transformers import TrainerCallback

from scalora.integrations.plugin import PluginSettings, leave_an_ordinary_adapter

_BLOCK = "scalora"
_ADAPTERS = ("lora", "qlora")

# They compute the adapted layers from lora_A and lora_B, and miss a remainder; of block signs they make whole factors.
# axolotl switches them on by default.
_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


class ScaloraArgs(BaseModel):
    """The key that the plug-in adds to axolotl's.

    Attributes:
        scalora: fields of `ScaLoraConfig`, and ``optimizer: pair_adamw``; or ``method: block_signs``.
    """

    scalora: dict[str, Any] | None = Field(
        default=None,
        description="Settings of ScaLoRA: fields of scalora.ScaLoraConfig, and optimizer: pair_adamw; or method: "
        "block_signs.",
    )


class ScaloraPlugin(BasePlugin):  # type: ignore[misc]
    """Trains axolotl's LoRA and QLoRA adapters with ScaLoRA, or with block signs.

    In its YAML file:

    ```yaml
    plugins:
      - scalora.integrations.axolotl.ScaloraPlugin
    scalora:
      interval: 10
    ```
    """

    def get_input_args(self) -> str:
        """Where axolotl finds the keys that the plug-in adds."""
        return f"{__name__}.{ScaloraArgs.__name__}"

    def register(self, cfg: dict[str, Any]) -> None:
        """Check the settings, before axolotl loads anything.

        Args:
            cfg: axolotl's settings as they were read; those of its kernels for LoRA are switched off where they are
                not set.

        Raises:
            ValueError: a setting is wrong, or asks for what ScaLoRA can't do. One line.
        """
        PluginSettings.from_block(cfg.get(_BLOCK), _BLOCK)
        if (adapter := cfg.get("adapter")) not in _ADAPTERS:
            raise ValueError(f"adapter must be {' or '.join(_ADAPTERS)} with ScaLoRA, got {adapter!r}")
        if cfg.get("relora"):
            raise ValueError("relora: true restarts the adapter that ScaLoRA trains: leave one of the two out")
        for kernel in _KERNELS:
            if cfg.get(kernel):
                raise ValueError(
                    f"{kernel}: true computes layers from lora_A and lora_B alone, which misses ScaLoRA's remainder "
                    "and what block signs save: leave it out"
                )
            cfg[kernel] = False

    def add_callbacks_pre_trainer(self, cfg: Any, model: nn.Module) -> list[TrainerCallback]:
        """The callback, for the Trainer's constructor: later, it could not resume.

        Args:
            cfg: axolotl's settings.
            model: the model; not used.
        """
        return [PluginSettings.from_block(cfg.get(_BLOCK), _BLOCK).callback()]

    def post_train_unload(self, cfg: Any) -> None:
        """Leave an ordinary adapter in the output folder.

        Args:
            cfg: axolotl's settings.
        """
        leave_an_ordinary_adapter(Path(cfg["output_dir"]))
