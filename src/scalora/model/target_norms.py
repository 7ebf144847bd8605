"""Target norms ``1/(s·√(Lη))`` of each layer, from the optimizer's base learning rates (paper, section 3)."""

from __future__ import annotations

from torch.optim import Optimizer

from scalora.config import ScaLoraConfig
from scalora.model.adapters import LoraPair


def target_norms(pairs: list[LoraPair], optimizer: Optimizer, config: ScaLoraConfig) -> dict[str, tuple[float, float]]:
    """The target norms of every layer.

    Args:
        pairs: the LoRA pairs of one model.
        optimizer: the optimizer of their parameters. With `smoothness`, its base (unscheduled) learning rates are used.
        config: the settings, with `target_norm` or `smoothness`.

    Returns:
        For each layer's name, the target norm for α and the one for β.

    Raises:
        ValueError: the optimizer does not hold an adapter parameter, or `smoothness` is set and a base learning rate is
            not positive.
    """
    rates = _base_learning_rates(optimizer)
    return {pair.name: _target_norms(pair, rates, config) for pair in pairs}


def _base_learning_rates(optimizer: Optimizer) -> dict[int, float]:
    """The unscheduled learning rate of each parameter, by the parameter's id.

    A scheduler keeps it in ``initial_lr``. With the scheduled rate, a decay to zero would make the factors explode.
    """
    return {
        id(parameter): float(group.get("initial_lr", group["lr"]))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _target_norms(pair: LoraPair, rates: dict[int, float], config: ScaLoraConfig) -> tuple[float, float]:
    for key, parameter in (("lora_A", pair.lora_A), ("lora_B", pair.lora_B)):
        if id(parameter) not in rates:
            raise ValueError(
                f"the optimizer does not hold {key} of module {pair.name!r}: create it from this model's parameters"
            )
    # α's term of the loss bound, aᵢ(Gᵀaᵢ)ᵀ, comes from the step on B, so it belongs to the learning rate of lora_A.
    norms = []
    for rate in (rates[id(pair.lora_A)], rates[id(pair.lora_B)]):
        if config.smoothness is not None and rate <= 0:
            raise ValueError(
                f"smoothness={config.smoothness} needs a positive base learning rate, but it is {rate} for module "
                f"{pair.name!r}: set it before attaching ScaLoRA, or give target_norm instead"
            )
        norms.append(config.column_norm(pair.scaling, rate))
    return norms[0], norms[1]
