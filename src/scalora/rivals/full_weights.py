"""Full fine-tuning and GaLore: methods that train the weights of the base itself.

GaLore saves optimizer memory by keeping Adam's moments in a low-rank space. It uses the authors' package, galore-torch
(Apache-2.0), through the integration in Transformers, with one difference: Transformers drops the betas, the epsilon
and the weight decay of the training arguments, which are passed on here.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from scalora.rivals.method import Method, adamw_arguments, require_positive

IN_BLOCKS = r".*\.\d+\..*"
"""Matches the modules in a transformer's blocks, whose names contain a number; heads, embeddings and poolers lie
outside. The authors of GaLore and of APOLLO project the linear layers of the blocks only."""


@dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning of all weights with the Trainer's optimizer. The settings under ``lora:`` have no effect."""

    learning_rate: ClassVar[float | None] = None
    """The default of the training arguments' class, which is meant for full fine-tuning."""

    ordinary_adapter: ClassVar[bool] = False

    def peft_config(self, settings: dict[str, Any]) -> None:
        """Train without an adapter.

        Args:
            settings: not used.
        """
        return


@dataclass(frozen=True)
class GaLore(Full):
    """GaLore: Adam in the subspace of the gradient's top singular vectors, which is updated periodically.

    Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", arXiv:2403.03507. The linear
    layers in the blocks are trained so, all other parameters by AdamW.

    Raises:
        ValueError: an option is not a positive number.
    """

    cannot_resume: ClassVar[str | None] = (
        "the projections in its optimizer's state are objects, which a Trainer does not load from a checkpoint"
    )

    optim: ClassVar[str] = "galore_adamw"
    """Name of the optimizer in ``training.optim``."""

    package: ClassVar[str] = "galore-torch"
    """Package that provides the optimizer, by its name for pip."""

    rank: int = 8
    """Rank of the space that the moments are kept in. The default is that of LoRA, so that both keep moments of similar
    size."""

    update_proj_gap: int = 200
    """Steps after which the low-rank space is computed anew. The default is the authors'."""

    scale: float = 4.0
    """Factor of the update. The default is the authors' for fine-tuning at a learning rate of 3e-5; their 0.25 is for
    pre-training at 1e-2."""

    def __post_init__(self) -> None:
        require_positive(self)

    def training_defaults(self) -> dict[str, Any]:
        """The training arguments that select and configure the optimizer.

        Raises:
            ImportError: the optimizer's package is not installed.
        """
        if find_spec(self.package.replace("-", "_")) is None:
            raise ImportError(f"the optimizer {self.optim} needs a package: pip install {self.package}")
        return {
            "optim": self.optim,
            "optim_target_modules": IN_BLOCKS,
            "optim_args": f"rank={self.rank},update_proj_gap={self.update_proj_gap},scale={self.scale}",
        }

    def optimizer(self, model: nn.Module, arguments: TrainingArguments) -> Optimizer:
        """The optimizer of Transformers, with the betas, the epsilon and the weight decay of the training arguments.

        Args:
            model: the model to train.
            arguments: the training arguments, from `training_defaults`.

        Raises:
            ValueError: the training arguments name another optimizer, or the model has no linear layers in blocks.
        """
        if arguments.optim != self.optim:
            raise ValueError(
                f"training.optim={getattr(arguments.optim, 'value', arguments.optim)!r}: the method needs the "
                f"optimizer {self.optim!r}; leave training.optim out"
            )
        cls, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        optimizer: Optimizer = cls(**keywords | adamw_arguments(arguments), no_deprecation_warning=True)
        return optimizer
