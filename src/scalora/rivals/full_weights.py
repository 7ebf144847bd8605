"""Rivals that train the base's own weights: full fine-tuning, and GaLore and APOLLO, whose optimizers save memory."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from scalora.rivals.method import Method, adamw_arguments, require_positive

# A transformer's blocks are the numbered part of its modules' names; heads, embeddings and poolers are outside them.
# The authors of both optimizers project the linear layers of the blocks and nothing else.
_IN_BLOCKS = r".*\.\d+\..*"


@dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning: every weight of the base, with the Trainer's optimizer. Settings under ``lora:`` do nothing."""

    learning_rate: ClassVar[float | None] = None
    ordinary_adapter: ClassVar[bool] = False

    def peft_config(self, settings: dict[str, Any]) -> None:
        """No adapter."""
        return


@dataclass(frozen=True)
class _LowRankMoments(Full):
    """Full fine-tuning with an optimizer of Transformers whose moments of the blocks' linear layers are low-rank.

    Everything else, the head included, is stepped by its plain AdamW.
    """

    cannot_resume: ClassVar[str | None] = (
        "its projections are objects in the optimizer's state, which a Trainer's checkpoint does not load"
    )

    optim: ClassVar[str]
    package: ClassVar[str]

    rank: int = 8
    """Of the projections. LoRA's default rank here, so that the moments are of like size."""

    update_proj_gap: int = 200
    """Steps between two projections. The authors'."""

    scale: float = 1.0
    """Of the update; what it means, and so its default, is each method's own."""

    def __post_init__(self) -> None:
        """Check the options."""
        require_positive(self)

    def training_defaults(self) -> dict[str, Any]:
        """Transformers' arguments for the optimizer.

        Raises:
            ImportError: its package is not installed.
        """
        if find_spec(self.package.replace("-", "_")) is None:
            raise ImportError(f"{self.optim} is in a package of its own: pip install {self.package}")
        return {
            "optim": self.optim,
            "optim_target_modules": _IN_BLOCKS,
            "optim_args": f"rank={self.rank},update_proj_gap={self.update_proj_gap},scale={self.scale}",
        }

    def optimizer(self, model: nn.Module, arguments: TrainingArguments) -> Optimizer:
        """Transformers' own with the betas, epsilon and weight decay that it leaves out.

        Raises:
            ValueError: the training arguments name another optimizer, or the model has no linear layers in blocks.
        """
        if arguments.optim != self.optim:
            raise ValueError(
                f"training.optim={getattr(arguments.optim, 'value', arguments.optim)!r}: the method is the optimizer "
                f"{self.optim!r}; leave training.optim out"
            )
        cls, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        optimizer: Optimizer = cls(**keywords | adamw_arguments(arguments), no_deprecation_warning=True)
        return optimizer


@dataclass(frozen=True)
class GaLore(_LowRankMoments):
    """GaLore: Adam in the gradient's top singular subspace, found anew now and then (Zhao et al., arXiv:2403.03507)."""

    optim: ClassVar[str] = "galore_adamw"
    package: ClassVar[str] = "galore-torch"

    scale: float = 4.0
    """Multiplies the update. The authors' for fine-tuning at 3e-5; their 0.25 is for pre-training at 1e-2."""


@dataclass(frozen=True)
class Apollo(_LowRankMoments):
    """APOLLO: the gradient, each channel scaled as Adam does in a random subspace (Zhu et al., arXiv:2412.05270)."""

    optim: ClassVar[str] = "apollo_adamw"
    package: ClassVar[str] = "apollo-torch"

    scale: float = 64.0
    """Its root multiplies the update and makes up for the low rank. The authors fine-tune with width/rank: this is it
    for a width of 512."""
