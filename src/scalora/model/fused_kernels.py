"""Refuses a factored remainder where another library computes adapted layers without calling them.

Unsloth and axolotl replace methods of attention and MLP modules by kernels that read ``lora_A``, ``lora_B`` and the
base weight of the layers inside. What is merged into the weight is in such a pass; a factored remainder is not.
"""

from __future__ import annotations

from types import FunctionType

from torch import nn

from scalora.model.adapters import refuse

# Packages whose functions with "lora" in their names do so.
_PACKAGES = ("unsloth", "axolotl.kernels")


def check_fused_kernels(model: nn.Module, merge: str) -> None:
    """Check that all adapted layers of a model are called.

    Args:
        model: the model.
        merge: the kind of its remainders.

    Raises:
        UnsupportedLayerError: the remainders are factored, and a module computes its adapted layers by a kernel of its
            own.
    """
    if merge != "factored":
        return
    for name, module in model.named_modules():
        for value in vars(module).values():
            function = getattr(value, "__func__", value)
            if not isinstance(function, FunctionType) or "lora" not in function.__name__.lower():
                continue
            if function.__module__.startswith(_PACKAGES):
                refuse(
                    name,
                    f"{function.__module__}.{function.__name__} computes its adapted layers without calling them, and "
                    "would leave out a factored remainder",
                    "use merge='dense', which a quantised base can't have, or switch the fused LoRA kernels off",
                )
