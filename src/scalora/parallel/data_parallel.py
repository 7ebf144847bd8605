"""DistributedDataParallel: looking through the wrapper, and keeping remainders out of its broadcasts."""

from __future__ import annotations

from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from scalora.model.factored_layer import REMAINDER
from scalora.rescale.remainder import REMAINDER_BUFFERS


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a DDP wrapper, whose broadcasts are told to leave remainders out; else the model itself.

    Args:
        model: with LoRA layers, wrapped or not.
    """
    if not isinstance(model, DistributedDataParallel):
        return model
    keep_out_of_broadcasts(model)
    inner: nn.Module = model.module
    return inner


def keep_out_of_broadcasts(model: nn.Module) -> None:
    """Exclude the buffers of remainders from DDP's broadcasts.

    Before every forward pass DDP sends the first process's buffers to all others, and the remainders of a
    half-precision base are as large as the base itself. They are the same in all processes, because the gradients that
    they come from are.

    Args:
        model: with LoRA layers; DDP is around a part of it already, or will be around it, or never.
    """
    for wrapper in model.modules():
        if isinstance(wrapper, DistributedDataParallel):
            wrapper.parameters_to_ignore |= _names_of_remainders(wrapper.module)
    # Read by DDP's constructor; there is no public name for it (PyTorch issue 43690, checked with torch 2.13).
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ())) | _names_of_remainders(model)
    model._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]


def _names_of_remainders(model: nn.Module) -> set[str]:
    """The names that the buffers of remainders have or will have."""
    layers = (name for name, module in model.named_modules() if isinstance(module, LoraLayer))
    return {f"{layer}.{REMAINDER}.{buffer}" for layer in layers for buffer in REMAINDER_BUFFERS}
