"""Finds the LoRA pairs of a PEFT model, in the paper's orientation. All knowledge of PEFT's layers is in this file."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, Linear, LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.pytorch_utils import Conv1D

from scalora.remainder import HALF, REMAINDER_BUFFERS, DenseRemainder, FactoredRemainder, Merge, Remainder

# PEFT's layers over quantised weights whose forward pass goes through a `LoraVariant` if there is one, which is what
# the factored remainder needs (bitsandbytes, GPTQ, HQQ, torchao); AWQ's, EETQ's and AQLM's do not.
_QUANTISED = ("Linear4bit", "Linear8bitLt", "GPTQLoraLinear", "HqqLoraLinear", "TorchaoLoraLinear")

# The submodule of a PEFT layer that holds its remainder.
REMAINDER = "frozen_remainder"


class UnsupportedLayerError(ValueError):
    """A module that can't be treated; the message names it and says the way out."""


@dataclass(frozen=True, eq=False)
class LoraPair:
    """One adapted layer: ``W + s·A·Bᵀ``.

    Attributes:
        name: the module's name in the model.
        lora_A: PEFT's parameter (r, n): the paper's Bᵀ.
        lora_B: PEFT's parameter (m, r): the paper's A.
        weight: the frozen base weight, (m, n), or (n, m) when `transposed`; packed somehow when `quantised`.
        quantised: whether the base weight can't be added to.
        transposed: whether the base stores its weight transposed (Conv1D, embeddings).
        layer: the PEFT layer; its scaling is read at each step because PEFT lets users change it.
        adapter: the adapter's name.
    """

    name: str
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    weight: Tensor
    quantised: bool
    transposed: bool
    layer: LoraLayer
    adapter: str

    @property
    def scaling(self) -> float:
        """s: alpha/r, or alpha/√r with rsLoRA."""
        return float(self.layer.scaling[self.adapter])

    @property
    def keys(self) -> tuple[str, str]:
        """The names of `lora_A` and `lora_B` among the model's parameters."""
        if self.adapter in self.layer.lora_embedding_A:
            return f"{self.name}.lora_embedding_A.{self.adapter}", f"{self.name}.lora_embedding_B.{self.adapter}"
        return f"{self.name}.lora_A.{self.adapter}.weight", f"{self.name}.lora_B.{self.adapter}.weight"

    @property
    def remainder(self) -> Remainder:
        """Where this layer's remainders go; `place_remainders` has put it there."""
        remainder: Remainder = getattr(self.layer, REMAINDER)
        return remainder

    @property
    def has_gradients(self) -> bool:
        """Whether both factors have one."""
        return self.lora_A.grad is not None and self.lora_B.grad is not None


def find_lora_pairs(model: nn.Module) -> list[LoraPair]:
    """All LoRA pairs of a model, each checked.

    Args:
        model: a `PeftModel`, or any module with PEFT LoRA layers injected.

    Raises:
        UnsupportedLayerError: there is no LoRA layer, or one that can't be treated: DoRA and other variants,
            convolutions, attention modules, sharded weights, tied base weights, half-precision, frozen or tied adapter
            weights, merged or disabled adapters, more adapters than the one that is active.
    """
    owners = _owners_of_parameters(model)
    pairs = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            pairs.append(_checked_pair(name, module, owners))
        elif isinstance(module, BaseTunerLayer):
            _refuse(name, f"{type(module).__name__} is not a LoRA layer", "adapt the model with LoraConfig")
    if not pairs:
        raise UnsupportedLayerError(
            "the model has no LoRA layers: wrap it with peft.get_peft_model(model, LoraConfig(...)) first"
        )
    return pairs


def _owners_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Names under which each parameter is reachable, by the parameter's id: more than one means tied."""
    owners = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    return owners


def _checked_pair(name: str, layer: LoraLayer, owners: dict[int, list[str]]) -> LoraPair:
    adapters = layer.active_adapters
    if len(adapters) != 1:
        _refuse(name, f"{len(adapters)} active adapters ({', '.join(adapters) or 'none'})", "activate exactly one")
    adapter = adapters[0]
    if others := sorted({*layer.lora_A, *layer.lora_embedding_A} - {adapter}):
        _refuse(
            name,
            f"it also holds adapter {others[0]!r}, which would be wrong once the base weight has changed",
            f"call delete_adapter({others[0]!r}); to a trainer that keeps a reference (DPO, KTO, GRPO) pass ref_model",
        )
    if layer.merged:
        _refuse(name, "its adapter is merged", "call unmerge_adapter() first")
    if layer.disable_adapters:
        _refuse(name, "its adapter is disabled", "call enable_adapter_layers() first")
    if layer.use_dora.get(adapter):
        _refuse(name, "DoRA's magnitude makes the update non-linear in A and B", "set use_dora=False")
    variant = layer.lora_variant.get(adapter)
    if variant is not None and not isinstance(variant, _WithRemainder):
        _refuse(name, f"the LoRA variant {type(variant).__name__} changes the update", "use plain LoRA")
    base = layer.get_base_layer()
    packed = type(layer).__name__ in _QUANTISED
    if not packed and (
        type(layer) not in (Linear, Embedding) or not isinstance(base, (nn.Linear, Conv1D, nn.Embedding))
    ):
        _refuse(
            name,
            f"{type(layer).__name__} over {type(base).__name__} is not a linear, Conv1D or embedding layer",
            "leave it out of target_modules",
        )
    weight = next(base.parameters(), None) if packed else base.weight
    if weight is None:
        weight = next(base.buffers())
    quantised = packed or type(weight) is not nn.Parameter or not weight.is_floating_point()
    if len(names := owners[id(weight)]) > 1:
        _refuse(
            name,
            f"its base weight is tied ({' = '.join(names)})",
            "leave it out of target_modules, or untie it",
        )
    if isinstance(layer, Embedding):
        lora_A, lora_B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        transposed = True
    else:
        lora_A, lora_B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        transposed = bool(getattr(layer, "fan_in_fan_out", False))
    for key, parameter in (("base weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        # FSDP2 and tensor parallelism, FSDP, ZeRO-3.
        if hasattr(parameter, "device_mesh") or "_fsdp_wrapped_module" in name or parameter.numel() == 0:
            _refuse(name, f"its {key} is sharded", "train with DistributedDataParallel")
    for key, parameter in (("lora_A", lora_A), ("lora_B", lora_B)):
        if not parameter.requires_grad:
            _refuse(name, f"{key} is frozen", "ScaLoRA trains both factors: set requires_grad=True")
        if parameter.dtype in HALF:
            _refuse(
                name,
                f"{key} is {parameter.dtype}, whose rounding a rescale would multiply",
                "keep the adapter in float32 (PEFT's autocast_adapter_dtype=True)",
            )
        if len(names := owners[id(parameter)]) > 1:
            _refuse(name, f"{key} is tied ({' = '.join(names)})", "use one adapter for each layer")
    return LoraPair(name, lora_A, lora_B, weight, quantised, transposed, layer, adapter)


def _refuse(name: str, why: str, way_out: str) -> None:
    raise UnsupportedLayerError(f"can't treat module {name!r}: {why}; {way_out}")


def promote_adapters(model: nn.Module) -> None:
    """Make half-precision adapter weights float32 in place, as PEFT itself does by default."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for key in module.adapter_layer_names:
                for parameter in getattr(module, key).parameters():
                    if parameter.dtype in HALF:
                        parameter.data = parameter.data.float()


def place_remainders(pairs: list[LoraPair], merge: Merge, max_rank: int) -> None:
    """Give every layer a place for its remainders; one that it already has stays.

    Args:
        pairs: of one model.
        merge: ``"dense"``, ``"factored"``, or ``"auto"``, see `resolve_merge`.
        max_rank: of a factored remainder.

    Raises:
        UnsupportedLayerError: dense on a quantised weight, or a place of the other kind is in use.
    """
    factored = resolve_merge(pairs, merge, max_rank) == "factored"
    for pair in pairs:
        if pair.quantised and not factored:
            _refuse(
                pair.name,
                f"its base weight is quantised ({type(pair.weight).__name__}, {pair.weight.dtype}) and can't be merged "
                "into",
                "set merge='factored'",
            )
        if (present := getattr(pair.layer, REMAINDER, None)) is not None:
            if isinstance(present, FactoredRemainder) != factored:
                kind, other = ("factored", "dense") if factored else ("dense", "factored")
                _refuse(pair.name, f"it already has a {other} remainder", f"set merge={other!r}, not {kind!r}")
            if isinstance(present, FactoredRemainder):
                present.max_rank = max_rank
    for pair in pairs:
        if hasattr(pair.layer, REMAINDER):
            continue
        if factored:
            m, n = pair.lora_B.shape[0], pair.lora_A.shape[1]
            remainder = FactoredRemainder(m, n, max_rank, dtype=pair.lora_A.dtype, device=pair.lora_A.device)
            pair.layer.add_module(REMAINDER, remainder)
            pair.layer.lora_variant[pair.adapter] = _WithRemainder()
        else:
            pair.layer.add_module(REMAINDER, DenseRemainder(pair.weight, transposed=pair.transposed))


def keep_out_of_broadcasts(model: nn.Module) -> None:
    """See to it that DistributedDataParallel does not send remainders around.

    Before every forward pass it sends the first process's buffers to all others, and of a half-precision base the
    remainders are as large as the base itself. They are the same in all processes, because the gradients are that they
    come from.

    Args:
        model: with LoRA layers; DDP is around a part of it already, or will be around it, or never.
    """
    for wrapper in model.modules():
        if isinstance(wrapper, DistributedDataParallel):
            wrapper.parameters_to_ignore |= _names_of_remainders(wrapper.module)
    # What DDP reads when it is made, and has no public name for (PyTorch issue 43690).
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ())) | _names_of_remainders(model)
    model._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]


def _names_of_remainders(model: nn.Module) -> set[str]:
    """The names that the buffers of remainders have or will have."""
    layers = (name for name, module in model.named_modules() if isinstance(module, LoraLayer))
    return {f"{layer}.{REMAINDER}.{buffer}" for layer in layers for buffer in REMAINDER_BUFFERS}


def resolve_merge(pairs: list[LoraPair], merge: Merge, max_rank: int) -> Merge:
    """What ``"auto"`` means for a model: ``"dense"`` or ``"factored"``.

    What the model already has, if it has been attached to before. Quantised weights can't take a merge: factored.
    Float32 and float64 ones can, at no cost in memory or time: dense, the paper's way. Half-precision ones can with 2
    more bytes an entry; the factors take 4 bytes an entry of theirs, and time in every forward and backward pass:
    factored where that saves half the memory or more, which also bounds the time (docs/cost.md).
    """
    if merge != "auto":
        return merge
    if (present := getattr(pairs[0].layer, REMAINDER, None)) is not None:
        return "factored" if isinstance(present, FactoredRemainder) else "dense"
    if any(pair.quantised for pair in pairs):
        return "factored"
    half = [pair for pair in pairs if pair.weight.dtype in HALF]
    factors = sum(4 * 2 * max_rank * (pair.lora_B.shape[0] + pair.lora_A.shape[1]) for pair in half)
    return "factored" if 0 < 2 * factors <= sum(2 * pair.weight.numel() for pair in half) else "dense"


class _WithRemainder(LoraVariant):  # type: ignore[misc]
    """Plain LoRA plus the layer's factored remainder, which sees the input without dropout, as a base weight would."""

    def supports_lora_conversion(self) -> bool:
        return False

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        remainder = getattr(module, REMAINDER)
        if isinstance(module, Embedding):
            lora_A, lora_B = module.lora_embedding_A[active_adapter], module.lora_embedding_B[active_adapter]
            update = (module._embed(x, lora_A.mT) @ lora_B.mT) * module.scaling[active_adapter]
            update = update + module._embed(x, remainder.right) @ remainder.left.mT
            if (scale := module._get_embed_scale()) is not None:
                update = update * scale.to(update.dtype)
        else:
            lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
            update = lora_B(lora_A(module.lora_dropout[active_adapter](x))) * module.scaling[active_adapter]
            update = update + nn.functional.linear(nn.functional.linear(x, remainder.right.mT), remainder.left)
        output: Tensor = result + update
        return output

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        merged: Tensor = orig_weight + _whole_update(module, active_adapter).to(orig_weight.dtype)
        return merged

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += _whole_update(module, active_adapter)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - _whole_update(module, active_adapter).to(orig_weight.dtype)


def _whole_update(module: LoraLayer, adapter: str) -> Tensor:
    """The adapter's and the remainder's update together, stored as the base weight is."""
    remainder = getattr(module, REMAINDER).dense()
    stored_transposed = isinstance(module, Embedding) or getattr(module, "fan_in_fan_out", False)
    update: Tensor = module.get_delta_weight(adapter) + (remainder.mT if stored_transposed else remainder)
    return update


def by_rank(pairs: list[LoraPair]) -> list[list[LoraPair]]:
    """Groups of pairs whose scalings can be solved for together: of one rank, dtype and device."""
    groups = defaultdict(list)
    for pair in pairs:
        groups[len(pair.lora_A), pair.lora_A.dtype, pair.lora_A.device].append(pair)
    return list(groups.values())


def by_shape(pairs: list[LoraPair]) -> list[list[LoraPair]]:
    """Groups of pairs that can be stacked: of one shape, dtype and device."""
    groups = defaultdict(list)
    for pair in pairs:
        m, r = pair.lora_B.shape
        groups[m, r, pair.lora_A.shape[1], pair.lora_B.dtype, pair.lora_B.device].append(pair)
    return list(groups.values())
