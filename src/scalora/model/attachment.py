"""What ScaLoRA keeps on a model, from one engine to the next."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from scalora.config import ScaLoraConfig
from scalora.model.remainder_layer import RemainderLayer


@dataclass(eq=False)
class Attachment:
    """What ScaLoRA keeps on a model, from one engine to the next.

    Attributes:
        fingerprint: fingerprint of the base before it was first changed.
        trained: the names of the parameters that were trained when ScaLoRA was first attached.
        config: settings of the engine that was attached last; None before the first.
        step: number of optimizer steps of the run.
        saved_by_callback: whether a Trainer's callback writes the state into checkpoints, as of a sharded model.
        base_rates: for each layer's name, the base learning rates of lora_A and lora_B; None before the first engine.
    """

    fingerprint: str
    trained: frozenset[str] = frozenset()
    config: ScaLoraConfig | None = None
    step: int = 0
    saved_by_callback: bool = False
    base_rates: dict[str, tuple[float, float]] | None = None
    _rescales: int = 0
    _skipped: Tensor | int = 0

    @property
    def rescales(self) -> int:
        """Number of rescales of the run. Waits for the device if GradScaler is in use."""
        return self._rescales - int(self._skipped)

    def count_rescale(self, skipped: Tensor | None) -> None:
        """Count a rescale, without waiting for the device.

        Args:
            skipped: a scalar that is positive if the optimizer skips the step; None if it can't.
        """
        self._rescales += 1
        if skipped is not None:
            self._skipped = self._skipped + skipped.bool()

    def restart(self, *, step: int, rescales: int) -> None:
        """Set the counts.

        Args:
            step: number of optimizer steps.
            rescales: number of rescales.
        """
        self.step, self._rescales, self._skipped = step, rescales, 0


def attachment_of(model: nn.Module) -> Attachment | None:
    """What ScaLoRA keeps on a model; None if it has never been attached.

    Args:
        model: the model, or anything that contains its layers.
    """
    layers = (module for module in model.modules() if isinstance(module, RemainderLayer))
    return next((layer.attachment for layer in layers), None)
