"""Keeps the weights of a base layer while adapters are merged into it, so that unmerging restores them bit for bit."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from scalora.model.layers import weight_key
from scalora.rescale.remainder import HALF


class BaseWeights:
    """The base layer under a LoRA layer and its parameters, as they are at one moment.

    Args:
        layer: the LoRA layer.
    """

    def __init__(self, layer: LoraLayer) -> None:
        self._layer, self._outer, self._base = layer, layer.base_layer, layer.get_base_layer()
        # A merge into a quantised weight makes new objects, so keeping the old ones is enough.
        self._objects = dict(self._base._parameters)
        if isinstance(layer, ParamWrapper):  # other layers have the other parameters
            self._objects = {key: self._objects[key] for key in [weight_key(layer)]}
        self._data = {name: p.detach().to("cpu", copy=True) for name, p in self._objects.items() if is_float(p)}
        state = vars(self._base).get("state")  # of bitsandbytes' 8-bit layers
        self._state = None if state is None else (state, dict(vars(state)))

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back, into the same tensors."""
        self._layer.base_layer = self._outer
        self._base._parameters.update(self._objects)
        for name, data in self._data.items():
            self._objects[name].data.copy_(data)
        if self._state is not None:
            state, attributes = self._state
            vars(state).clear()
            vars(state).update(attributes)


def is_float(parameter: Tensor | None) -> bool:
    """Whether a parameter is an ordinary one of 16 bits or more, not a quantised one.

    Args:
        parameter: the parameter; may be None.
    """
    return type(parameter) is nn.Parameter and parameter.dtype in (torch.float32, torch.float64, *HALF)
