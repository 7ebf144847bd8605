"""Finds the LoRA pairs of a PEFT model, in the paper's notation (section 3), and refuses unsupported layers by name.

All knowledge of PEFT's LoRA layers is in this folder. To support a new kind of layer, add it to `scalora.model.layers`
and, if PEFT keeps its factors or its weight elsewhere, to `_checked_pair`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, Linear, ParamWrapper
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from scalora.model.layers import (
    ADAPTABLE,
    CONVOLUTIONS,
    QUANTISED,
    configured_scaling,
    experts_of,
    factor_keys,
    factors_of,
    has_signs,
    is_copy,
    is_distributed,
    is_partitioned,
    plain_name,
    stored_transposed,
    weight_key,
    whole_shape,
)
from scalora.model.matrices import is_viewable, stack_of_A, stack_of_B, stack_of_weight
from scalora.model.mixed_class import plain_class
from scalora.model.remainder_forward import WithRemainder
from scalora.model.remainder_layer import REMAINDER, RemainderLayer
from scalora.rescale.remainder import HALF, FactoredRemainder, Remainder

# Float8 weights are floating too, but a merge would be rounded to their few bits.
MERGEABLE = (torch.float32, torch.float64, *HALF)
"""Dtypes of base weights that can take a merge."""

CHUNK = 1 << 24
"""Bytes of factors that are handled together. For a rescale by matrices, temporary tensors take some ten times as many:
copies of the factors, gradients and moments, in part in float64."""

Item = TypeVar("Item")

# PEFT's layers over unquantised weights.
_PLAIN = (Linear, Embedding, Conv1d, Conv2d, Conv3d)


class UnsupportedLayerError(ValueError):
    """A module that ScaLoRA does not support. The message names the module, the reason and what to do."""


@dataclass(frozen=True, eq=False)
class LoraPair:
    """One adapted layer: ``W + s·A·Bᵀ``, or a stack of E such matrices, a mixture's experts.

    Attributes:
        name: the module's name in the model, without wrappers (`scalora.model.layers.plain_name`).
        lora_A: PEFT's ``lora_A.weight``, (r, n): the paper's Bᵀ. Of other shapes for experts and convolutions
            (`scalora.model.matrices`).
        lora_B: PEFT's ``lora_B.weight``, (m, r): the paper's A. Of other shapes for experts and convolutions.
        weight: the frozen base weight, (m, n), or (n, m) if `transposed`; in a packed format if `quantised`. For
            experts, (E, m, n) or (E, n, m); for a convolution, (m, inputs, …).
        quantised: whether the base weight is quantised, so that nothing can be merged into it.
        tied: the names of the base weight if it has more than one, so that a merge would change other layers.
        transposed: whether the base weight is stored transposed (Conv1D, embeddings).
        layer: the PEFT layer. Its scaling is read at each step, because PEFT lets users change it.
        adapter: the adapter's name.
        experts: E, the number of matrices that `weight` is a stack of; 1 for one matrix.
        twin: of an embedding, the output head that has its factors, transposed (``ensure_weight_tying``).
        masters: whether the optimizer keeps float32 copies of factors in half precision (DeepSpeed), which are trained.
    """

    name: str
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    weight: Tensor
    quantised: bool
    tied: tuple[str, ...]
    transposed: bool
    layer: LoraLayer
    adapter: str
    experts: int = 1
    twin: LoraPair | None = None
    masters: bool = False

    @property
    def m(self) -> int:
        """Rows of W: out_features."""
        return whole_shape(self.lora_B)[0]

    @property
    def n(self) -> int:
        """Columns of W: in_features, or the entries of a convolution's patches."""
        return math.prod(whole_shape(self.lora_A)[1:])

    @property
    def r(self) -> int:
        """The adapter's rank, that of each expert."""
        return whole_shape(self.lora_A)[0] // self.experts

    @property
    def dtype(self) -> torch.dtype:
        """What the factors are trained in: their own dtype, or that of their copies in float32."""
        return torch.promote_types(self.lora_A.dtype, torch.float32)

    @property
    def scaling(self) -> float:
        """s: PEFT's ``lora_alpha / r``, or ``lora_alpha / √r`` with rsLoRA."""
        return float(self.layer.scaling[self.adapter])

    @property
    def merge_scaling(self) -> float:
        """What a remainder is added at: a factored one is scaled with its adapter, a dense one stays as it is."""
        factored = isinstance(self.remainder, FactoredRemainder)
        return configured_scaling(self.layer, self.adapter) if factored else self.scaling

    @property
    def keys(self) -> tuple[str, str]:
        """The names of `lora_A` and `lora_B` in ``model.named_parameters()``, as `plain_name` gives them."""
        key_A, key_B = factor_keys(self.layer, self.adapter)
        return f"{self.name}.{key_A}", f"{self.name}.{key_B}"

    @property
    def remainder(self) -> Remainder:
        """The layer's remainder, which `scalora.model.placement.place_remainders` has attached."""
        # Without the detour of a module's attributes: a rescale asks for it several times.
        remainder: Remainder = self.layer._modules[REMAINDER]
        return remainder

    @property
    def layers(self) -> list[LoraLayer]:
        """The layers that have the factors: `layer`, and the twin's."""
        return [self.layer] if self.twin is None else [self.layer, self.twin.layer]

    @property
    def other_adapters(self) -> list[str]:
        """The names of the layer's other adapters, which are inactive."""
        return sorted({*self.layer.lora_A, *self.layer.lora_embedding_A} - {self.adapter})

    @property
    def is_sharded(self) -> bool:
        """Whether this process has only a part of any of the layer's tensors (FSDP2, ZeRO-3)."""
        tensors = (self.weight, self.lora_A, self.lora_B)
        return any(is_distributed(tensor) or is_partitioned(tensor) for tensor in tensors)

    @property
    def has_gradients(self) -> bool:
        """Whether both factors have a gradient."""
        return self.lora_A.grad is not None and self.lora_B.grad is not None

    def check_ready(self) -> None:
        """Check that the layer can be rescaled: it may have been changed since ScaLoRA was attached.

        Raises:
            UnsupportedLayerError: the adapter is merged, or has been converted to half precision.
        """
        if self.layer.merged:
            refuse(
                self.name, "its adapter is merged during an optimizer step", "call unmerge_adapter() before the step"
            )
        for key, parameter in (("lora_A", self.lora_A), ("lora_B", self.lora_B)):
            if not self.masters:
                _check_dtype(self.name, key, parameter)

    def oriented(self, matrix: Tensor) -> Tensor:
        """Convert a matrix from the base weight's storage order to the paper's (m, n), or back.

        Args:
            matrix: in the storage order of the base weight, or (m, n).
        """
        return matrix.mT if self.transposed else matrix

    @property
    def is_matrix(self) -> bool:
        """Whether the layer is one matrix, with tensors of its shape: not a stack of experts, nor a convolution."""
        return self.experts == 1 and len(whole_shape(self.lora_A)) == 2

    def matrices_of_A(self, lora_A: Tensor) -> list[Tensor]:
        """The (r, n) of each expert, or of the layer, as views.

        Args:
            lora_A: `lora_A`, or a tensor of its shape, also for another rank.
        """
        return list(stack_of_A(lora_A, self.experts))

    def matrices_of_B(self, lora_B: Tensor) -> list[Tensor]:
        """The (m, r) of each expert, or of the layer, as views.

        Args:
            lora_B: `lora_B`, or a tensor of its shape, also for another rank.
        """
        return list(stack_of_B(lora_B, self.experts))

    def matrices_of_weight(self, weight: Tensor) -> list[Tensor]:
        """The weight of each expert, or of the layer, as matrices in their storage order, as views.

        Args:
            weight: `weight`, or a tensor of its shape.
        """
        return list(stack_of_weight(weight, self.experts))


def find_lora_pairs(
    model: nn.Module,
    *,
    sharded: bool = False,
    all_shapes: bool = False,
    masters: bool = False,
    signed: bool = False,
) -> list[LoraPair]:
    """Find all LoRA pairs of a model and check that each is supported.

    Args:
        model: a `PeftModel`, or any module into which PEFT has injected LoRA layers.
        sharded: whether the caller can do with parts of tensors, as of FSDP2 and ZeRO-3. Few can, so by default these
            are refused.
        all_shapes: whether the caller can do with layers that are not one matrix: experts that are one parameter, and
            convolutions. Few can, so by default these are refused.
        masters: whether the optimizer keeps float32 copies of factors in half precision. Few do, so by default these
            are refused.
        signed: whether the caller can do with updates that have block signs, whose `LoraPair` has the factors without
            them. Few can, so by default these are refused.

    Raises:
        UnsupportedLayerError: there is no LoRA layer, or an unsupported one: DoRA and other variants, attention
            modules, grouped convolutions, sharded or trained base weights, adapter weights that are in half precision,
            frozen or tied, a merged or disabled adapter, more than one active adapter.
    """
    owners = _owners_of_parameters(model)
    pairs = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            if not _has_active_adapter(module):
                continue
            _check_signs(name, module, allowed=signed)
            pairs.append(_checked_pair(name, module, owners, sharded=sharded, all_shapes=all_shapes, masters=masters))
        elif isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer):
            refuse(name, f"{type(module).__name__} is not a LoRA layer", "adapt the model with peft.LoraConfig")
    pairs = _with_twins(pairs) if all_shapes else pairs
    for pair in pairs:
        _check_untied(pair, owners)
    if not pairs:
        raise UnsupportedLayerError(
            "the model has no LoRA layers: wrap it with peft.get_peft_model(model, LoraConfig(...)) first"
        )
    return pairs


def pairs_with_remainders(model: nn.Module) -> list[LoraPair]:
    """The LoRA pairs of a model with remainders, for saving: whichever adapter is active, trained or not.

    Args:
        model: the model.
    """
    owners = _owners_of_parameters(model)
    pairs = [
        _pair(name, module, module.trained_adapter, owners)
        for name, module in model.named_modules()
        if isinstance(module, RemainderLayer)
    ]
    return _with_twins(pairs)


def refuse(name: str, reason: str, way_out: str) -> None:
    """Raise `UnsupportedLayerError` for a module.

    Args:
        name: name of the module.
        reason: why it is not supported, as a clause.
        way_out: what the user can do, as an imperative.
    """
    raise UnsupportedLayerError(f"module {name!r} is not supported: {reason}; {way_out}")


def _owners_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter, by `_memory_of`. A parameter with more than one name is tied.

    Each module counts once, even if a wrapper (Lightning Fabric's) holds it under two names.
    """
    owners = defaultdict(list)
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners[_memory_of(parameter)].append(f"{name}.{key}" if name else key)
    return owners


def _memory_of(parameter: Tensor) -> int:
    """Identifies a parameter's memory: with ``ensure_weight_tying``, PEFT's tied factors are views of one another."""
    has_memory = parameter.numel() and not parameter.is_meta and not is_distributed(parameter)
    return parameter.data_ptr() if has_memory else -id(parameter)


def _checked_pair(
    name: str, layer: LoraLayer, owners: dict[int, list[str]], *, sharded: bool, all_shapes: bool, masters: bool
) -> LoraPair:
    adapter = _only_adapter(name, layer)
    _check_plain_lora(name, layer, adapter)
    pair = replace(_pair(name, layer, adapter, owners), masters=masters)
    if isinstance(layer, ParamWrapper):
        _check_parameter(pair, layer, allowed=all_shapes)
    if isinstance(pair.layer.get_base_layer(), CONVOLUTIONS):
        _check_convolution(pair, allowed=all_shapes)
    # Controls have attached layers compute the gradients of their weights (`scalora.rivals.controls.OracleRestarts`).
    if pair.weight.requires_grad and not isinstance(layer, RemainderLayer):
        refuse(
            name,
            "its base weight is trained too, so a merge would leave the optimizer with moments of another weight",
            "freeze it (requires_grad_(False)), or leave the module out of target_modules",
        )
    for key, parameter in (("base weight", pair.weight), ("lora_A", pair.lora_A), ("lora_B", pair.lora_B)):
        # A model that is there as a whole for its shapes has all of them there.
        if parameter.is_meta and not (pair.weight.is_meta and pair.lora_A.is_meta and pair.lora_B.is_meta):
            refuse(name, f"its {key} is on the meta device, without values", "load the model without offloading")
        if is_distributed(parameter) or is_partitioned(parameter):
            if not sharded:
                what = "deepspeed.initialize()" if is_partitioned(parameter) else "fully_shard()"
                refuse(name, f"its {key} is sharded", f"call this before {what}, or use DistributedDataParallel")
        elif "_fsdp_wrapped_module" in name or parameter.numel() == 0:  # FSDP1
            refuse(name, f"its {key} is sharded", "use fully_shard() (FSDP2) or DistributedDataParallel")
    for key, factor in (("lora_A", pair.lora_A), ("lora_B", pair.lora_B)):
        if is_copy(factor) and not masters:
            refuse(
                name,
                f"DeepSpeed's optimizer steps a copy of its {key} and would overwrite what is changed here",
                "call this before deepspeed.initialize(), or pass the optimizer that it or accelerator.prepare() has "
                "returned",
            )
        _check_factor(name, key, factor, masters=masters)
    return pair


def _with_twins(pairs: list[LoraPair]) -> list[LoraPair]:
    """The pairs, with heads that have the factors of an embedding as its twins."""
    heads = {
        (_memory_of(pair.lora_B), _memory_of(pair.lora_A)): pair for pair in pairs if isinstance(pair.layer, Linear)
    }
    found, twins = [], set()
    for pair in pairs:
        head = heads.get((_memory_of(pair.lora_A), _memory_of(pair.lora_B)))
        if head is not None and isinstance(pair.layer, Embedding) and head.lora_B.shape == pair.lora_A.mT.shape:
            pair = replace(pair, twin=head)
            twins.add(head.name)
        found.append(pair)
    return [pair for pair in found if pair.name not in twins]


def _pair(name: str, layer: LoraLayer, adapter: str, owners: dict[int, list[str]]) -> LoraPair:
    weight, quantised = _base_weight(name, layer)
    lora_A, lora_B = factors_of(layer, adapter)
    names = owners[_memory_of(weight)]
    tied = tuple(names) if len(names) > 1 else ()
    transposed, experts = stored_transposed(layer), experts_of(layer)
    return LoraPair(plain_name(name), lora_A, lora_B, weight, quantised, tied, transposed, layer, adapter, experts)


def _check_parameter(pair: LoraPair, layer: ParamWrapper, *, allowed: bool) -> None:
    """Check a parameter that PEFT adapts itself, which most often is a stack of experts."""
    what = f"PEFT adapts the parameter {layer.parameter_name!r} of {type(layer.get_base_layer()).__name__} itself"
    if pair.experts > 1 and not allowed:
        refuse(
            pair.name,
            f"{what} (experts: for target_modules='all-linear' too, whatever exclude_modules says), which this "
            "method can't train",
            "list the linear layers, as in target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj'], and leave "
            "target_parameters out",
        )
    if pair.weight.ndim != (2 if pair.experts == 1 else 3):
        refuse(pair.name, f"{what}, a stack of one matrix", "leave it out of target_parameters")
    if pair.is_sharded or "_fsdp_wrapped_module" in pair.name or pair.weight.numel() == 0:
        refuse(
            pair.name,
            f"{what}, and it is sharded, which is not supported of such parameters",
            "train with DistributedDataParallel, or leave it out of target_parameters",
        )


def _has_active_adapter(layer: LoraLayer) -> bool:
    """Whether a layer has the active adapter: PEFT activates it in all layers, also in those that it leaves out."""
    adapters = layer.active_adapters
    return not adapters or any(adapter in layer.scaling for adapter in adapters)


def _only_adapter(name: str, layer: LoraLayer) -> str:
    """The only active adapter of a layer, which must be enabled and not merged."""
    adapters = layer.active_adapters
    if len(adapters) != 1:
        refuse(name, f"{len(adapters)} active adapters ({', '.join(adapters) or 'none'})", "activate exactly one")
    adapter: str = adapters[0]
    if layer.merged:
        refuse(name, "its adapter is merged", "call unmerge_adapter() first")
    if layer.disable_adapters:
        refuse(name, "its adapter is disabled", "call enable_adapter_layers() first")
    return adapter


def _check_plain_lora(name: str, layer: LoraLayer, adapter: str) -> None:
    """Refuse variants of LoRA whose update is not ``s·A·Bᵀ``."""
    if layer.use_dora.get(adapter):
        refuse(name, "with DoRA's magnitude the update is not linear in A and B", "set use_dora=False")
    variant = layer.lora_variant.get(adapter)
    if variant is not None and not isinstance(variant, WithRemainder):
        refuse(name, f"the LoRA variant {type(variant).__name__} changes the update", "use plain LoRA")


def _check_signs(name: str, layer: LoraLayer, *, allowed: bool) -> None:
    if not allowed and any(has_signs(layer, adapter) for adapter in layer.active_adapters):
        refuse(
            name,
            "its update has block signs, which rescales and most methods do not know",
            "train it with scalora.PairAdamW or another optimizer alone, or leave add_block_signs out",
        )


def _base_weight(name: str, layer: LoraLayer) -> tuple[Tensor, bool]:
    """The frozen weight under a layer, and whether it is quantised."""
    base = layer.get_base_layer()
    kind = plain_class(layer)
    packed, of_parameter = kind.__name__ in QUANTISED, issubclass(kind, ParamWrapper)
    known = kind in _PLAIN and isinstance(base, (*ADAPTABLE, *CONVOLUTIONS))
    if not (packed or of_parameter or known):
        refuse(
            name,
            f"{kind.__name__} over {type(base).__name__} is not a linear, Conv1D, embedding or convolutional layer",
            "leave it out of target_modules",
        )
    weight = next(base.parameters(), None) if packed else getattr(base, weight_key(layer))
    if weight is None:
        weight = next(base.buffers())
    plain = type(weight) is nn.Parameter or is_distributed(weight)
    return weight, packed or not plain or weight.dtype not in MERGEABLE


def _check_convolution(pair: LoraPair, *, allowed: bool) -> None:
    """Check a convolution, whose update is ``s·A·Bᵀ`` only if that of PEFT sees the patches that the base sees."""
    base, leave = pair.layer.get_base_layer(), "leave it out of target_modules"
    what = f"{type(base).__name__} is a convolution"
    if not allowed:
        refuse(pair.name, f"{what}, which this method can't train", leave)
    if pair.is_sharded:
        refuse(pair.name, f"{what}, and it is sharded", f"train with DistributedDataParallel, or {leave}")
    if base.groups > 1:
        refuse(pair.name, f"with groups={base.groups} its update is no product of PEFT's lora_B and lora_A", leave)
    if base.padding_mode != "zeros" or set(base.dilation) != {1}:
        reason = f"padding_mode={base.padding_mode!r}, dilation={base.dilation}"
        refuse(pair.name, f"PEFT's lora_A has other patches than the base layer with {reason}", leave)
    tensors = {"base weight": pair.weight, "lora_A": pair.lora_A, "lora_B": pair.lora_B}
    for key, tensor in tensors.items():
        if not is_viewable(tensor):
            way_out = "call model.to(memory_format=torch.contiguous_format) before attaching"
            refuse(pair.name, f"the {key} of the convolution is not contiguous", way_out)


def _check_factor(name: str, key: str, parameter: nn.Parameter, *, masters: bool) -> None:
    if not parameter.requires_grad:
        refuse(name, f"{key} is frozen", "ScaLoRA trains both factors: set requires_grad=True")
    if not masters:
        _check_dtype(name, key, parameter)


def _check_untied(pair: LoraPair, owners: dict[int, list[str]]) -> None:
    for key, parameter in (("lora_A", pair.lora_A), ("lora_B", pair.lora_B)):
        if len(names := owners[_memory_of(parameter)]) > len(pair.layers):
            refuse(pair.name, f"{key} is tied ({' = '.join(names)})", "use one adapter for each layer")


def _check_dtype(name: str, key: str, parameter: nn.Parameter) -> None:
    if parameter.dtype in HALF:
        refuse(
            name,
            f"{key} is {parameter.dtype}, too coarse for small steps, and rescales would multiply its rounding errors",
            "keep the adapter in float32 (PEFT's autocast_adapter_dtype=True)",
        )


def promote_adapters(model: nn.Module) -> None:
    """Convert half-precision adapter weights to float32 in place, as PEFT does by default.

    Args:
        model: a model with PEFT LoRA layers; modified.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for key in module.adapter_layer_names:
                for parameter in getattr(module, key).parameters():
                    if parameter.dtype in HALF:
                        parameter.data = parameter.data.float()


def rank_key(pair: LoraPair) -> tuple[int, torch.dtype, torch.device]:
    """What pairs have in common whose scalings can be solved for together: rank, dtype and device.

    Args:
        pair: the LoRA pair.
    """
    return pair.r, pair.dtype, pair.lora_A.device


def by_rank(pairs: list[LoraPair]) -> list[list[LoraPair]]:
    """Group pairs whose scalings can be solved for together, by rank, dtype and device.

    Args:
        pairs: the LoRA pairs of one model.
    """
    groups: dict[tuple[int, torch.dtype, torch.device], list[LoraPair]] = defaultdict(list)
    for pair in pairs:
        groups[rank_key(pair)].append(pair)
    return list(groups.values())


def by_shape(pairs: list[LoraPair]) -> list[list[LoraPair]]:
    """Group pairs that can be stacked, by shape, dtype and device.

    Args:
        pairs: LoRA pairs.
    """
    groups: dict[tuple[int, int, int, torch.dtype, torch.device], list[LoraPair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.m, pair.r, pair.n, pair.dtype, pair.lora_B.device].append(pair)
    return list(groups.values())


def in_chunks(items: list[Item], pairs: list[LoraPair]) -> list[list[Item]]:
    """Divide what belongs to pairs of one shape so that copies of a chunk's factors take little memory.

    Args:
        items: something of each pair.
        pairs: the pairs.
    """
    most = max(1, CHUNK // (pairs[0].lora_A.nbytes + pairs[0].lora_B.nbytes))
    return [items[start : start + most] for start in range(0, len(items), most)]
