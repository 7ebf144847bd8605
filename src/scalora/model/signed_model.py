"""What a PeftModel does differently whose adapter has block signs: copies of it, and dicts of what is trained."""

from __future__ import annotations

from typing import Any, NoReturn

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from scalora.model.mixed_class import MixedIn
from scalora.model.signed_factors import SignedA, SignedB, SignedFactor, is_split


class SignedConfig(LoraConfig):  # type: ignore[misc]
    """The configuration of an adapter with block signs. It is written as that of the ordinary adapter that it is."""


class SignedModel(MixedIn, PeftModel):  # type: ignore[misc]
    """Mixed into the class of a PeftModel."""

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        """PEFT's `add_adapter`. With the configuration of an adapter that has block signs, the new one has them too.

        TRL makes its adapter for reference that way, and then copies what is trained, parameter by parameter.

        Args:
            adapter_name: the new adapter's name.
            peft_config: its configuration.
            args: as PEFT's.
            kwargs: as PEFT's.
        """
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)
        if isinstance(peft_config, SignedConfig):
            for layer in self.modules():
                if isinstance(layer, LoraLayer) and adapter_name in layer.lora_A:
                    _sign_as_others(layer, adapter_name)

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's `save_pretrained`, which also takes a ``state_dict`` of `named_parameters`.

        Args:
            save_directory: as PEFT's.
            args: as PEFT's.
            kwargs: as PEFT's.

        Raises:
            RuntimeError: this process has a part of the factors: FSDP2 or ZeRO-3 has split them.
        """
        given = kwargs.get("state_dict")
        if given is not None:
            kwargs["state_dict"] = self._with_ordinary_factors(given)
        elif any(isinstance(module, SignedFactor) and is_split(module.factor) for module in self.modules()):
            _refuse_parts()
        super().save_pretrained(save_directory, *args, **kwargs)

    def _with_ordinary_factors(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        ordinary = {}
        for key, value in state_dict.items():
            name, _, parameter = key.rpartition(".")
            module = self.get_submodule(name) if parameter == "factor" else None
            if isinstance(module, SignedFactor):
                if is_split(value) or not value.numel():
                    _refuse_parts()
                ordinary[f"{name}.weight"] = module.expanded(value)
            else:
                ordinary[key] = value
        return ordinary


def _refuse_parts() -> NoReturn:
    raise RuntimeError(
        "factors with block signs are split over processes, and this process has a part of them: gather them in all "
        "processes, as Accelerator.get_state_dict(model) does, and pass them to save_pretrained() as state_dict"
    )


def _sign_as_others(layer: LoraLayer, name: str) -> None:
    """Give a new adapter of a layer the signs of another one, and the shapes of its trained factors."""
    other = next((module for module in layer.lora_B.values() if isinstance(module, SignedB)), None)
    if other is None:
        return
    A, B, r = layer.lora_A[name].weight, layer.lora_B[name].weight, other.factor.shape[1]
    signs = (other.blocks, other.parts)
    layer.lora_A[name] = SignedA(nn.Parameter(A[:r].detach().clone(), A.requires_grad), *signs)
    layer.lora_B[name] = SignedB(nn.Parameter(B[:, :r].detach().clone(), B.requires_grad), *signs)
