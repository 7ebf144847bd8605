"""PEFT's model of LoRA layers, for adapters that have a factored remainder beside their two factors.

PEFT leaves to this class which tensors are an adapter's, and how adapters are combined: `get_peft_model_state_dict`,
and with it PEFT's, Transformers' and Accelerate's ways of saving adapters, looks it up in PEFT's table of methods.
Checked with PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import Tensor, nn

from scalora.model.layers import factor_keys, factors_of
from scalora.model.remainder_layer import REMAINDER, ChangedBaseError, RemainderLayer
from scalora.model.whole_adapter import remainder_layers, whole_config
from scalora.rescale.remainder import DenseRemainder

_AS_GIVEN = ContextVar("tensors_as_given", default=False)


@contextmanager
def tensors_as_given() -> Iterator[None]:
    """Context manager in which PEFT saves the tensors of a ``state_dict`` that it is given, and no remainders."""
    token = _AS_GIVEN.set(True)
    try:
        yield
    finally:
        _AS_GIVEN.reset(token)


class RemainderLoraModel(LoraModel):  # type: ignore[misc]
    """`LoraModel` that takes an adapter's remainder for a part of the adapter. Other adapters are PEFT's as ever."""

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        entries: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        for name, layer in remainder_layers(model).items():
            prefix = f"{name.removeprefix('_fsdp_wrapped_module.')}."
            for key in [key for key in entries if key.startswith(f"{prefix}{REMAINDER}.")]:
                del entries[key]
            saved_whole = _AS_GIVEN.get() or layer.attachment.saved_by_callback
            if layer.trained_adapter == adapter_name and layer.has_remainder and not saved_whole:
                _check_whole(entries, prefix, layer)
        return entries

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT would leave its hooks behind if a layer refused the names. Without any, all modules need not be looked
        # through in every forward pass, which takes milliseconds.
        if names := kwargs.get("adapter_names"):
            self._check_adapters(names, f"adapter_names={names}")
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    # PEFT's methods change something before they come to the layers, so these refuse on their behalf, and first.

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's way to add an adapter to the layers.

        Args:
            model: the base model.
            adapter_name: name of the adapter.
            args: other arguments of PEFT's method.
            kwargs: other arguments of PEFT's method.

        Raises:
            ChangedBaseError: the base that the adapter belongs to has been changed.
        """
        self._check_adapters([adapter_name], f"adding adapter {adapter_name!r}")
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """PEFT's choice of the active adapters.

        Args:
            adapter_name: the adapters.
            inference_mode: whether they are frozen.

        Raises:
            ChangedBaseError: another adapter belongs to the original base, which has been changed.
        """
        self.check_set_adapter(adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def check_set_adapter(self, adapter_name: str | list[str]) -> None:
        """Check that adapters may be active.

        Args:
            adapter_name: the adapters.

        Raises:
            ChangedBaseError: another adapter belongs to the original base, which has been changed.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        self._check_adapters(names, f"set_adapter({adapter_name!r})")

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's deletion of an adapter.

        Args:
            adapter_name: its name.

        Raises:
            ChangedBaseError: part of the adapter's update can't be deleted from the base.
        """
        for layer in remainder_layers(self.model).values():
            layer.check_deletion(adapter_name)
        super().delete_adapter(adapter_name)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's merge of adapters into the base.

        Args:
            args: arguments of PEFT's method.
            kwargs: arguments of PEFT's method.

        Raises:
            ChangedBaseError: an adapter of the original base would be merged into the changed one.
        """
        _untie_tokens(self.model)
        super().merge_adapter(*args, **kwargs)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            _untie_tokens(self.model)
        return super()._unload_and_optionally_merge(merge, *args, **kwargs)

    def _check_adapters(self, names: Iterable[str], what: str) -> None:
        for layer in remainder_layers(self.model).values():
            layer.check_adapters(names, what)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """PEFT's combination of adapters, each taken with its remainder.

        Args:
            adapters: names of the adapters.
            weights: their weights.
            adapter_name: name of the new adapter, whose rank can be higher than those of `adapters`.
            args: other arguments of PEFT's method.
            kwargs: other arguments of PEFT's method.

        Raises:
            ChangedBaseError: part of an adapter is in the base.
        """
        with self._ordinary_adapters(adapters) as ordinary:
            super().add_weighted_adapter([ordinary.get(a, a) for a in adapters], weights, adapter_name, *args, **kwargs)

    @contextmanager
    def _ordinary_adapters(self, adapters: list[str]) -> Iterator[dict[str, str]]:
        """Adds ordinary adapters that equal the given ones with their remainders, and deletes them in the end."""
        names = {
            adapter: f"{adapter}_with_remainder"
            for adapter in adapters
            if any(layer.has_remainder for layer in remainder_layers(self.model, adapter).values())
        }
        try:
            for adapter, name in names.items():
                self._add_ordinary(adapter, name)
            yield names
        finally:
            for name in names.values():
                if name in self.peft_config:
                    self.delete_adapter(name)

    @torch.no_grad()
    def _add_ordinary(self, adapter: str, name: str) -> None:
        layers = remainder_layers(self.model, adapter)
        self.peft_config[name] = whole_config(self.peft_config[adapter], layers)
        self.inject_adapter(self.model, name)
        for layer in layers.values():
            for parameter, factor in zip(factors_of(layer, name), layer.whole_factors(), strict=True):
                parameter.copy_(factor)
            layer.scaling[name] = layer.trained_scaling


def _untie_tokens(model: nn.Module) -> None:
    """Give layers whose tokens are trained apart weights of their own, where PEFT would merge all tokens into one."""
    merged = set()
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer) and module.tied_adapter is None:
            base = module.get_base_layer()
            if id(base.weight) in merged:
                base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=base.weight.requires_grad)
            merged.add(id(base.weight))


def _check_whole(entries: dict[str, Tensor], prefix: str, layer: RemainderLayer) -> None:
    """Check that the factors among an adapter's tensors are those of its whole update."""
    adapter = layer.trained_adapter
    if isinstance(layer.remainder, DenseRemainder):
        raise ChangedBaseError(
            f"the tensors of adapter {adapter!r} are not its whole update, because ScaLoRA has merged part of it into "
            "the base weights: save it with the PeftModel's save_pretrained() or the engine's save() and make an "
            "adapter of that with scalora.export_adapter(), or set merge='factored'"
        )
    key_A = prefix + factor_keys(layer, adapter)[0]
    if len(entries[key_A]) == len(layer.trained_factors[0]):
        raise ChangedBaseError(
            f"the state_dict holds the factors of adapter {adapter!r} without the remainder ({key_A}), which are not "
            "its whole update: pass the model's own state_dict(), or none"
        )


def use_in_peft(tuner: LoraModel | None) -> None:
    """Have PEFT take remainders into account, in a model and wherever it looks up the class for LoRA.

    Args:
        tuner: the model's tuner (``peft_model.base_model``); modified. None for a model without a PeftModel around it.
    """
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = RemainderLoraModel
    if type(tuner) is LoraModel:
        tuner.__class__ = RemainderLoraModel
