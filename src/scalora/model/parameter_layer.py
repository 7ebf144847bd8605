"""What PEFT's layer of a single parameter is once a remainder belongs to it: experts, most often (`ParamWrapper`).

Its forward pass adds the update to the parameter of the module below. The layers of a module's parameters are nested,
one around the other, and that module is the base layer of all of them. Checked with PEFT 0.21.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scalora.model.layers import configured_scaling, stored_transposed, weight_key
from scalora.model.remainder_forward import factors_for_a_pass
from scalora.model.remainder_layer import RemainderLayer
from scalora.rescale.remainder import FactoredRemainder


class ParameterRemainderLayer(RemainderLayer):
    """Mixed into the class of PEFT's layer of a parameter."""

    def get_delta_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, float]:
        """The factors of the update of an adapter and its factored remainder, and what their product is multiplied by.

        Their product is (E, m, n), or (E, n, m) if the experts are stored so. PEFT adds it in one operation.

        Args:
            adapter_name: the adapter's name.
        """
        first, second, scaling = super().get_delta_factors(adapter_name)
        if adapter_name == self.trained_adapter and isinstance(self.remainder, FactoredRemainder):
            left, right = factors_for_a_pass(self)
            left = left / configured_scaling(self, adapter_name)
            if stored_transposed(self):
                left, right = right, left
            first = torch.cat([first, left.to(first)], dim=-1)
            second = torch.cat([second, right.mT.to(second)], dim=-2)
        return first, second, scaling

    @property
    def base_weight_name(self) -> str:
        """The name of the base weight in the layer."""
        depth, layer = 0, self
        while hasattr(layer, "base_layer"):
            depth, layer = depth + 1, layer.base_layer
        return "base_layer." * depth + weight_key(self)
