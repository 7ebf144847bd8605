"""What methods have in common that replace LoRA's update by another matrix, on PEFT's linear layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import Tensor, nn

from scalora.model.adapters import UnsupportedLayerError
from scalora.rivals.method import Backward, BeforeTraining, Method


@dataclass(frozen=True)
class ReplacesUpdate(Method):
    """Base class of such methods. Their update starts at zero."""

    ordinary_adapter: ClassVar[bool] = False
    before_training: ClassVar[BeforeTraining] = "lost"  # TRL can't copy what is no pair of factors

    title: ClassVar[str]
    """What the method is called in messages."""

    def peft_config(self, settings: dict[str, Any]) -> PeftConfig | None:
        """The configuration by which PEFT selects the layers.

        Args:
            settings: fields of `peft.LoraConfig`.

        Raises:
            ValueError: ``init_lora_weights`` is not True. Other starts are none for another update, and some of PEFT's
                change the base weights.
        """
        return starting_at_zero(settings, self.title)

    def adapt(
        self, model: nn.Module, config: PeftConfig | None, backward: Backward, learning_rate: float | None = None
    ) -> nn.Module:
        """Add PEFT's LoRA layers and replace their updates.

        Args:
            model: the base model, which is modified.
            config: the configuration of the adapter, from `peft_config`.
            backward: not used.
            learning_rate: not used.

        Returns:
            The model to train.

        Raises:
            UnsupportedLayerError: a layer is quantised or not linear, or has an option of LoRA that the method lacks.
        """
        adapted = super().adapt(model, config, backward)
        for name, module in adapted.named_modules():
            if isinstance(module, LoraLayer):
                for adapter in module.active_adapters:
                    _check_layer(self.title, name, module, adapter)
                    self.replace_update(name, module, adapter)
        return adapted

    def replace_update(self, name: str, layer: LoraLayer, adapter: str) -> None:
        """Replace the update of an adapter of a linear layer.

        Args:
            name: the layer's name.
            layer: the PEFT layer.
            adapter: the adapter's name.
        """
        raise NotImplementedError


def starting_at_zero(settings: dict[str, Any], title: str) -> LoraConfig:
    """The configuration of an adapter whose update is no product of factors, so that other starts are none for it.

    Args:
        settings: fields of `peft.LoraConfig`.
        title: what the method is called in messages.

    Raises:
        ValueError: ``init_lora_weights`` is not True.
    """
    config = LoraConfig(**settings)
    if config.init_lora_weights is not True:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r}: the update of {title} starts at zero; leave the setting "
            "out"
        )
    return config


class OwnUpdate(LoraVariant):  # type: ignore[misc]
    """A variant of LoRA that merges a matrix of its own."""

    def supports_lora_conversion(self) -> bool:
        """Whether PEFT may convert it to LoRA: no."""
        return False

    def update(self, module: LoraLayer, adapter: str) -> Tensor:
        """What the adapter adds to the weight, (m, n), without gradients.

        Args:
            module: the layer.
            adapter: the adapter's name.
        """
        raise NotImplementedError

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """A copy of the weight with the update.

        Args:
            module: the layer.
            active_adapter: the adapter's name.
            orig_weight: the weight.
        """
        return orig_weight + self.update(module, active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """Add the update to the weight in place.

        Args:
            module: the layer.
            active_adapter: the adapter's name.
            orig_weight: the weight.
        """
        orig_weight.data += self.update(module, active_adapter)

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """A copy of the weight without the update.

        Args:
            module: the layer.
            active_adapter: the adapter's name.
            orig_weight: the weight.
        """
        return orig_weight - self.update(module, active_adapter).to(orig_weight.dtype)


def _check_layer(method: str, name: str, layer: Any, adapter: str) -> None:
    base = layer.get_base_layer()
    if type(layer) is not Linear or not isinstance(base, nn.Linear):
        raise UnsupportedLayerError(
            f"{method} can't adapt module {name!r}: {type(layer).__name__} over {type(base).__name__} is not an "
            "unquantised linear layer; leave it out of target_modules, or load the base without quantisation"
        )
    if adapter in layer.lora_variant or layer.lora_bias[adapter]:
        raise UnsupportedLayerError(
            f"{method} can't adapt module {name!r}: it has neither variants of LoRA nor a bias; set use_dora, "
            "lora_bias and similar options to False"
        )
