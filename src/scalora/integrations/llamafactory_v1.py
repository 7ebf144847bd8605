"""ScaLoRA in LLaMA-Factory's v1: an optimizer that is called ``scalora`` there, and a command that registers it.

``python -m scalora.integrations.llamafactory_v1 CONFIG`` is v1's ``sft``. v1 imports no other package's plug-ins
itself. Checked with LLaMA-Factory 0.9.5, which has v1 beside the version that people use (`scalora.integrations.
llamafactory`); an import of this module needs it, scalora does not.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from llamafactory.v1.config import get_args
from llamafactory.v1.core.base_trainer import BaseTrainer
from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin
from llamafactory.v1.trainers.sft_trainer import run_sft
from torch import nn
from torch.optim import Optimizer

from scalora.block_signs import add_block_signs
from scalora.engine import ScaLora
from scalora.integrations.plugin import PluginSettings, leave_an_ordinary_adapter
from scalora.integrations.transformers import calling
from scalora.pair_adamw import PairAdamW

_NAME = "scalora"


@OptimizerPlugin(_NAME).register()  # type: ignore[untyped-decorator]
def optimizer_with_scalora(model: nn.Module, config: Mapping[str, Any]) -> Optimizer:
    """The optimizer for ``optim_config: {name: scalora, …}``, with ScaLoRA attached, or with block signs in the model.

    Args:
        model: the model.
        config: the block: fields of `ScaLoraConfig`, and ``optimizer: pair_adamw``; or ``method: block_signs``. The
            learning rate is LLaMA-Factory's.

    Raises:
        ValueError: a setting is wrong. One line.
    """
    settings = _settings(config)
    if settings.config is None:
        add_block_signs(model, settings.blocks)  # first, because the optimizer takes the parameters that they leave
    trainer = calling(BaseTrainer)
    rate = {} if trainer is None else {"lr": trainer.args.learning_rate}
    if settings.pair_adamw:
        optimizer: Optimizer = PairAdamW(model, **rate)
    else:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **rate, weight_decay=0.0)
    if settings.config is not None:
        ScaLora(model, optimizer, settings.config)
    return optimizer


def main() -> None:
    """LLaMA-Factory's ``sft``, with an ordinary adapter in the output folder at its end."""
    arguments = get_args()[2]
    try:
        if arguments.optim_config is None or arguments.optim_config.name != _NAME:
            raise ValueError(f"set optim_config: {{name: {_NAME}}}, with the settings of ScaLoRA beside the name")
        _settings(arguments.optim_config)
        if arguments.resume_from_checkpoint:
            raise ValueError(
                "resume_from_checkpoint is not supported with ScaLoRA in v1: its checkpoints lack a part of the update"
            )
    except ValueError as error:
        sys.exit(str(error))
    run_sft()
    leave_an_ordinary_adapter(Path(arguments.output_dir))


def _settings(config: Mapping[str, Any]) -> PluginSettings:
    return PluginSettings.from_block({key: value for key, value in config.items() if key != "name"}, "optim_config")


if __name__ == "__main__":
    main()
