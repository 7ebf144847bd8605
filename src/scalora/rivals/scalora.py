"""ScaLoRA (arXiv:2510.23818) as a `Method`, which is also the base class of the controls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, get_args

from peft import PeftConfig
from torch import nn
from transformers import TrainerCallback

from scalora.config import ScaLoraConfig
from scalora.engine import ScaLora
from scalora.integrations.transformers import ScaLoraCallback
from scalora.rivals.method import Backward, Method
from scalora.start import optimal_start, random_start

Start = Literal["zero", "random", "oracle"]


@dataclass(frozen=True)
class ScaLoraMethod(Method):
    """ScaLoRA, attached to the Trainer by `scalora.ScaLoraCallback`.

    With ``warmup_steps`` beyond the end of a run, it is plain LoRA with the same start.

    Raises:
        ValueError: there is no such start.
    """

    engine: ClassVar[Callable[..., ScaLora]] = ScaLora
    """The class, or a function with the same arguments, that attaches ScaLoRA to a model and its optimizer."""

    ordinary_adapter: ClassVar[bool] = False

    config: ScaLoraConfig = field(default_factory=ScaLoraConfig)
    """The settings under ``scalora:`` in a run's config."""

    start: Start = "zero"
    """Start of the adapter. zero: ``lora_B = 0``, as PEFT. random: random columns of the target norm. oracle: the
    gradient's singular vectors, scaled to the target norm (`scalora.optimal_start`). The product of a random or oracle
    start is subtracted from the base weight. zero by default, because it needs no gradients."""

    def __post_init__(self) -> None:
        if self.start not in get_args(Start):
            raise ValueError(f"start={self.start!r}: the starts are {', '.join(get_args(Start))}")

    def adapt(
        self, model: nn.Module, config: PeftConfig | None, backward: Backward, learning_rate: float | None = None
    ) -> nn.Module:
        """Add the adapter and give it its start.

        Args:
            model: the base model, which is modified.
            config: the configuration of the adapter, from `peft_config`.
            backward: computes gradients, for the start ``oracle``.
            learning_rate: the base (unscheduled) learning rate of the training that follows, on which the target norm
                of the starts ``random`` and ``oracle`` depends with `smoothness`.

        Returns:
            The model to train.

        Raises:
            UnsupportedLayerError: a layer can't be adapted, or can't have the chosen start.
            ValueError: for the start ``oracle``, if a layer got no finite gradient or is too small for the rank; with
                `smoothness`, if the learning rate is missing or not positive.
        """
        model = super().adapt(model, config, backward)
        settings: dict[str, Any] = {
            "target_norm": self.config.target_norm,
            "smoothness": self.config.smoothness,
            "learning_rate": learning_rate,
            "merge": self.config.merge,
            "remainder_rank": self.config.remainder_rank,
        }
        if self.start == "oracle":
            optimal_start(model, partial(backward, model), **settings)
        elif self.start == "random":
            random_start(model, **settings)
        return model

    def callbacks(self) -> list[TrainerCallback]:
        """The callback that attaches the engine to the Trainer's model and optimizer."""
        return [ScaLoraCallback(self.config, make_engine=self.engine)]
