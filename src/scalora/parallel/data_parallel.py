"""DistributedDataParallel: unwrapping models, and keeping remainders out of its broadcasts (paper, section 6)."""

from __future__ import annotations

from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from scalora.model.adapters import UnsupportedLayerError, refuse
from scalora.model.remainder_layer import REMAINDER
from scalora.model.roots import root_of
from scalora.rescale.remainder import REMAINDER_BUFFERS

_INSTEAD_OF_STAGES = "pipeline parallelism is not supported; train with fully_shard() (FSDP2)"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without wrappers that add no parameters, such as DDP's.

    Args:
        model: a model with LoRA layers, or a wrapper around it, or the base model inside a PeftModel.

    Raises:
        UnsupportedLayerError: the model contains more than one PeftModel, or is a stage of a pipeline.
    """
    _refuse_stage(model)
    while isinstance(model, DistributedDataParallel):
        model = model.module
    # Only FSDP's wrapper tells that the weights inside are pieces of weights.
    sharded = any(name.endswith("_fsdp_wrapped_module") for name, _ in model.named_modules())
    return model if sharded else root_of(model)


def _refuse_stage(model: nn.Module) -> None:
    """Refuse a model of which other processes have other layers: their states would not be saved."""
    # Checked with torch 2.13 and Transformers 5.23.
    if type(model).__module__.startswith("torch.distributed.pipelining"):
        raise UnsupportedLayerError(f"{type(model).__name__} is a stage of a pipeline: {_INSTEAD_OF_STAGES}")
    for name, module in model.named_modules():
        if type(module).__name__ == "PipelineIdentityLayer":
            refuse(name, "another stage of a pipeline has it", _INSTEAD_OF_STAGES)


def keep_out_of_broadcasts(model: nn.Module) -> None:
    """Exclude the buffers of remainders from DDP's broadcasts.

    Before every forward pass, DDP sends the buffers of the first process to all others, and the remainders of a
    half-precision base are as large as the base. There is no need to: they are equal in all processes, because they are
    computed from gradients that are.

    Args:
        model: a model with LoRA layers. DDP may already wrap parts of it, or wrap all of it later.
    """
    for wrapper in model.modules():
        if isinstance(wrapper, DistributedDataParallel):
            wrapper.parameters_to_ignore |= _names_of_remainders(wrapper.module)
    # DDP's constructor reads this attribute, which has no public name (PyTorch issue 43690; checked with torch 2.13).
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ())) | _names_of_remainders(model)
    model._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]


def _names_of_remainders(model: nn.Module) -> set[str]:
    """The names of the buffers of all remainders, whether or not they are attached yet."""
    layers = (name for name, module in model.named_modules() if isinstance(module, LoraLayer))
    return {f"{layer}.{REMAINDER}.{buffer}" for layer in layers for buffer in REMAINDER_BUFFERS}
