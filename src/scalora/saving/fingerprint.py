"""`base_fingerprint`: tells whether a state and a base model belong together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from scalora.model.layers import is_distributed, plain_name
from scalora.parallel.flat import sampled_runs
from scalora.parallel.shards import sampled
from scalora.parallel.zero import run_of_weight

# Entries of each weight that go into the fingerprint, evenly spaced. A training step changes nearly all entries, so a
# few of each weight are enough to tell models apart, and cheap for models of any size.
_SAMPLES = 64

# Parts of the names of heads that are trained, and of their originals.
_HEADS = (".original_module.", ".modules_to_save.")


def base_fingerprint(model: nn.Module) -> str:
    """Identifies the frozen base of a PEFT model, by hashes over names, shapes, dtypes and samples of its weights.

    The first hash is over frozen parameters. Parameters that are trained are not included, nor the originals that PEFT
    keeps of trained heads. The second one is over what else a layer may keep its weights in: saved buffers, as GPTQ's,
    HQQ's and AWQ's do, except for statistics that layers collect while they train, and the scales that bitsandbytes
    computes when it quantises. Of these only the powers of two, since devices differ in the last bits.

    Two bases that differ in few entries only, none of which is among the 64 samples of its weight, are not told apart.

    Args:
        model: a PEFT model whose base has not been changed yet.

    Returns:
        Two SHA-256 hashes of 64 hexadecimal digits, with a ``-`` in between; only the first if there is nothing else
        than parameters, or bitsandbytes has overwritten its scales with rounded ones, as it does for inference on CPUs.
    """
    # From the state dict and not from the parameters: bitsandbytes changes the layout of a 4-bit weight when it is used
    # for inference on a CPU.
    tensors = model.state_dict()
    of_parameters = hashlib.sha256()
    # PEFT keeps the original of a head that it trains a copy of. A new head is random and differs with every load.
    named = sorted((plain_name(name), name, parameter) for name, parameter in model.named_parameters())
    frozen = {
        name: tensors.get(full_name, tensors.get(name, parameter))
        for name, full_name, parameter in named
        if not parameter.requires_grad and ".original_module." not in name
    }
    runs = {name: run for name, _, p in named if name in frozen and (run := run_of_weight(p)) is not None}
    samples = sampled_runs(runs, _SAMPLES) if runs else {}
    if any(map(is_distributed, frozen.values())):
        samples = sampled(frozen, _SAMPLES)
    for name, tensor in frozen.items():
        shape = runs[name].shape if name in runs else tensor.shape
        _add(of_parameters, name, tensor, samples.get(name), shape)
    others = _beside_parameters(model, tensors)
    if not others or any(name.endswith(".absmax") and t.dtype == torch.bfloat16 for name, t in others.items()):
        return of_parameters.hexdigest()
    buffers = {plain_name(name) for name, _ in model.named_buffers(remove_duplicate=False)}
    of_others = hashlib.sha256()
    for name, tensor in sorted(others.items()):
        if name in buffers:
            _add(of_others, name, tensor)
        elif tensor.is_floating_point():
            _add(of_others, name, torch.frexp(tensor.float()).exponent)
    return f"{of_parameters.hexdigest()}-{of_others.hexdigest()}"


def difference(saved: str, present: str) -> tuple[str, str] | None:
    """What is different between two fingerprints.

    Args:
        saved: one fingerprint. Earlier versions saved only the first hash.
        present: the other one.

    Returns:
        The beginnings of the two hashes that differ; None if the bases are equal as far as both say.
    """
    for one, other in zip(saved.split("-"), present.split("-"), strict=False):
        if one != other:
            return one[:12], other[:12]
    return None


def _beside_parameters(model: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict that are no parameters, heads or statistics."""
    left_out = {name for name, _ in model.named_parameters(remove_duplicate=False)} | set(_statistics(model))
    left_out = set(map(plain_name, left_out))
    return {
        name: value
        for name, value in ((plain_name(name), value) for name, value in tensors.items())
        if isinstance(value, Tensor) and name not in left_out and not any(part in name for part in _HEADS)
    }


def _add(digest: Any, name: str, tensor: Tensor, sample: Tensor | None = None, shape: torch.Size | None = None) -> None:
    if sample is None:
        if hasattr(tensor, "__tensor_flatten__"):  # a quantised weight of torchao: a tensor made of tensors
            for part in tensor.__tensor_flatten__()[0]:
                _add(digest, f"{name}.{part}", getattr(tensor, part))
            return
        flat = tensor.reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].contiguous().cpu()
    digest.update(f"{name} {tuple(tensor.shape if shape is None else shape)} {tensor.dtype}".encode())
    digest.update(sample.view(torch.uint8).numpy().tobytes())


def _statistics(model: nn.Module) -> Iterator[str]:
    """The names of the buffers that forward passes change in training."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _NormBase):
            yield from (f"{name}.{buffer}" for buffer, _ in module.named_buffers(recurse=False))
