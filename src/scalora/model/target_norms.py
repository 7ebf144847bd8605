"""The target norms ``1/(s·√(Lη))`` of each layer, from the optimizer's base learning rates (paper, section 3)."""

from __future__ import annotations

from torch.optim import Optimizer

from scalora.config import ScaLoraConfig
from scalora.model.adapters import LoraPair


def target_norms(pairs: list[LoraPair], optimizer: Optimizer, config: ScaLoraConfig) -> dict[str, tuple[float, float]]:
    """The target norms for α and for β of every layer, by the layer's name.

    Args:
        pairs: of one model.
        optimizer: holds their parameters; its base (unscheduled) learning rates are taken.
        config: says which target norm is wanted.

    Raises:
        ValueError: the optimizer does not hold an adapter parameter, or `smoothness` is given and a learning rate is 0.
    """
    rates = _base_learning_rates(optimizer)
    return {pair.name: _target_norms(pair, rates, config) for pair in pairs}


def _base_learning_rates(optimizer: Optimizer) -> dict[int, float]:
    """The unscheduled learning rate of each parameter, by the parameter's id.

    A scheduler keeps it in ``initial_lr``: with the scheduled rate a decay would blow the factors up.
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
                f"the optimizer does not hold {key} of module {pair.name!r}: build it from the parameters of this model"
            )
    # α's term of the loss bound, aᵢ(Gᵀaᵢ)ᵀ, comes from the step on B, so it goes with the learning rate of lora_A.
    norms = []
    for rate in (rates[id(pair.lora_A)], rates[id(pair.lora_B)]):
        if config.smoothness is not None and rate <= 0:
            raise ValueError(
                f"smoothness={config.smoothness} needs the base learning rate, which is {rate} for module "
                f"{pair.name!r}: attach after setting it, or give target_norm"
            )
        norms.append(config.column_norm(pair.scaling, rate))
    return norms[0], norms[1]
