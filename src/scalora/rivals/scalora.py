"""ScaLoRA itself as a `Method`, and the base of the controls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal, get_args

from peft import PeftConfig
from torch import nn
from transformers import TrainerCallback

from scalora.config import DEFAULT_TARGET_NORM, ScaLoraConfig
from scalora.engine import ScaLora
from scalora.integrations.transformers import ScaLoraCallback
from scalora.rivals.method import Backward, Method
from scalora.start import optimal_start, random_start

Start = Literal["zero", "random", "oracle"]


@dataclass(frozen=True)
class ScaLoraMethod(Method):
    """LoRA with `scalora.ScaLoraCallback` (arXiv 2510.23818); its settings are under ``scalora:`` in a config.

    With more ``warmup_steps`` than the run has steps it is plain LoRA from the same start.

    Raises:
        ValueError: an unknown start.
    """

    engine: ClassVar[Callable[..., ScaLora]] = ScaLora
    ordinary_adapter: ClassVar[bool] = False

    config: ScaLoraConfig = field(default_factory=ScaLoraConfig)

    start: Start = "zero"
    """PEFT's ``lora_B = 0``; or random columns of the target norm; or the gradient's singular vectors at it
    (`scalora.optimal_start`): the latter two are taken off the base weight. PEFT's, because it needs no gradients."""

    def __post_init__(self) -> None:
        """Check the start."""
        if self.start not in get_args(Start):
            raise ValueError(f"start={self.start!r}: the starts are {', '.join(get_args(Start))}")

    def adapt(self, model: nn.Module, config: PeftConfig | None, backward: Backward) -> nn.Module:
        """Wrap by PEFT, then give the adapter its start."""
        model = super().adapt(model, config, backward)
        merge, rank = self.config.merge, self.config.remainder_rank
        norm = self.config.target_norm or DEFAULT_TARGET_NORM
        if self.start == "oracle":
            optimal_start(model, partial(backward, model), target_norm=norm, merge=merge, remainder_rank=rank)
        elif self.start == "random":
            random_start(model, target_norm=norm, merge=merge, remainder_rank=rank)
        return model

    def callbacks(self) -> list[TrainerCallback]:
        """The engine's."""
        return [ScaLoraCallback(self.config, make_engine=self.engine)]
