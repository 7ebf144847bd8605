"""What an engine warns about, once each: layers and whole runs without rescales, and a remainder of too low a rank."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor

from scalora.config import ScaLoraConfig
from scalora.maths.lowrank import DEFAULT_RTOL
from scalora.rescale.metrics import LEFT_ALONE_BECAUSE

# Warn if compressions have discarded more than this share of a factored remainder. An exported adapter may leave out as
# much.
DISCARD_WARNING = DEFAULT_RTOL

# Of a method of this class, called by one of the engine, called by the user.
_USER = 4


class Notices:
    """The warnings of one engine. Not given during a step, which must not wait for the device.

    Args:
        config: the engine's settings.
    """

    def __init__(self, config: ScaLoraConfig) -> None:
        self._config = config
        self._given: set[str] = set()

    def about_layers(self, left_alone: Mapping[str, Tensor]) -> None:
        """Warn of layers that were left alone.

        Args:
            left_alone: how often, for each reason in `LEFT_ALONE_BECAUSE`.
        """
        for reason, explanation in LEFT_ALONE_BECAUSE.items():
            if count := int(left_alone[reason].item()):
                self._warn(reason, f"ScaLoRA left layers alone in rescales ({count} times): {explanation}")

    def about_discarded(self, discarded: float) -> None:
        """Warn if compressions have discarded much.

        Args:
            discarded: the norm of what they left out, relative to that of the factored remainders.
        """
        if discarded > DISCARD_WARNING:
            self._warn(
                "discarded",
                f"remainder_rank={self._config.remainder_rank} is too small for this run: compressions have discarded "
                f"{discarded:.1e} of the factored remainder; raise it, or set merge='dense'",
            )

    def about_run(self, optimizer: str, steps: int, rescales: int, *, had_gradients: bool) -> None:
        """Warn if a run had no rescale, or only rescales of nothing.

        Args:
            optimizer: name of the optimizer's class.
            steps: number of steps of the run.
            rescales: number of rescales of the run.
            had_gradients: whether any layer had gradients in a rescale.
        """
        if rescales and had_gradients:
            return
        first = self._config.warmup_steps + self._config.interval
        if not steps:
            why = (
                f"the {optimizer} that it was attached to took no step; if another optimizer trained the model, attach "
                "to that one"
            )
        elif rescales:
            why = "no layer had gradients of both lora_A and lora_B when the optimizer stepped"
        elif steps < first:
            why = (
                f"with warmup_steps={self._config.warmup_steps} and interval={self._config.interval} the first rescale "
                f"is at step {first}, and the run had {steps}"
            )
        else:
            why = "GradScaler skipped all steps that had one"
        self._warn("run", f"ScaLoRA never rescaled, so the model was trained as plain LoRA: {why}")

    def _warn(self, about: str, text: str) -> None:
        if about not in self._given:
            self._given.add(about)
            warnings.warn(text, stacklevel=_USER)


def in_one_line(error: Exception) -> str:
    """An error's type and the first line of its message.

    Args:
        error: the error.
    """
    reason = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {reason}"
