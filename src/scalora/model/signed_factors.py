"""PEFT's modules ``lora_A`` and ``lora_B`` of an update whose blocks have signs (`scalora.maths.block_signs`).

To PEFT, and to whatever reads a state dict, they are ordinary factors of the rank that the update has: what merges,
combines, converts or saves an adapter by ``lora_A.weight`` and ``lora_B.weight`` gets the whole update. What is trained
is smaller, and called `factor`. Checked with PEFT 0.21.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scalora.maths.block_signs import (
    add_signed_linear,
    block_signs,
    compact_A,
    compact_B,
    expanded_A,
    expanded_B,
    product_with_A,
    product_with_B,
)
from scalora.model.adapters import UnsupportedLayerError
from scalora.model.layers import is_distributed, is_partitioned
from scalora.model.made_factor import MadeFactor, refuse_to_write
from scalora.model.mixed_class import MixedIn
from scalora.model.shared_pass import autocasts, dtype_of_products, has_hooks

_NO_PARAMETER = (
    "factors with block signs are no parameters any more, as FSDP1 and DataParallel leave them: train with "
    "fully_shard() (FSDP2), DeepSpeed or DistributedDataParallel, or leave add_block_signs out"
)


def whole_of(tensor: Tensor) -> Tensor:
    """All of a tensor, with a collective if FSDP2 has split it, in which all processes must take part.

    Args:
        tensor: a tensor, or a DTensor.
    """
    if not is_distributed(tensor):
        return tensor
    # With offloading, the shards are not where the group's backend takes tensors from.
    there: Any = tensor if tensor.is_meta else tensor.to(tensor.device_mesh.device_type)  # type: ignore[attr-defined]
    whole: Tensor = there.full_tensor().to(tensor.device)
    return whole


def split_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, split as another one is, without communication; the tensor itself if nothing is to be split.

    Args:
        tensor: the tensor, the same in all processes.
        like: a tensor, or a DTensor; its shape may be another.
    """
    if not is_distributed(like) or is_distributed(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    replicas = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    split: Tensor = replicas.redistribute(placements=like.placements)  # type: ignore[attr-defined]
    return split


def is_split(factor: Tensor) -> bool:
    """Whether a trained factor is not here as a whole: with ZeRO-3 it is, where it is gathered.

    Args:
        factor: the factor.
    """
    return is_distributed(factor) or (is_partitioned(factor) and not factor.numel())


class SignedFactor(nn.Module):
    """A factor of an update whose blocks have signs.

    FSDP2 and DeepSpeed's ZeRO-3 may split what is trained over processes. Then state dicts have what is trained, under
    its own name, by which they save and load it.

    Args:
        factor: what is trained: (r, n), or (m, r).
        blocks: the number of parts that the update's sides are divided into, a power of two.
        parts: the number of parts that the update's columns could be divided into.

    Raises:
        UnsupportedLayerError: the factor is set to something that is no parameter, as FSDP1 does.

    Attributes:
        factor: the trained parameter.
        blocks: the number of parts.
        parts: that of the columns.
        in_features: the number of inputs of the ordinary factor.
        out_features: its number of outputs.
    """

    bias = None  # as of PEFT's modules
    in_features: int
    out_features: int

    def __init__(self, factor: nn.Parameter, blocks: int, parts: int) -> None:
        super().__init__()
        self.factor = factor
        self.blocks = blocks
        self.parts = parts

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            refuse_to_write()
        if name == "factor" and not isinstance(value, nn.Parameter):  # FSDP1 (checked with torch 2.13)
            raise UnsupportedLayerError(_NO_PARAMETER)
        super().__setattr__(name, value)

    @property
    def weight(self) -> Tensor:
        """The ordinary factor, made of the trained one at each call, to read; gradients go through it."""
        made = self.expanded(self.factor)
        plain = torch.compiler.is_compiling() or is_distributed(made)
        return made if plain else made.as_subclass(MadeFactor)

    def expanded(self, factor: Tensor) -> Tensor:
        """The ordinary factor for a trained one, as a tensor of its own, which is split as that is.

        Args:
            factor: as the trained one.
        """
        return split_as(self._expanded(whole_of(factor)), factor)

    def _expanded(self, factor: Tensor) -> Tensor:
        """`expanded`, of a whole factor."""
        raise NotImplementedError

    def _compacted(self, weight: Tensor) -> Tensor:
        """The inverse of `_expanded`, if `weight` is what that makes."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """What is shown of the module beside its name."""
        return f"{', '.join(map(str, self.factor.shape))}, blocks={self.blocks}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # Accelerate fills the shards of a model on the meta device from a state dict that was made before they were.
        if is_split(self.factor) and not self.factor.is_meta:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        with torch.no_grad():
            destination[f"{prefix}weight"] = self.expanded(self.factor)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key, own_key = f"{prefix}weight", f"{prefix}factor"
        if strict:
            unexpected_keys += (k for k in state_dict if k.startswith(prefix) and k not in (key, own_key))
        if (factor := state_dict.get(own_key)) is not None:  # of a dict of `named_parameters()`, or of shards
            if factor is self.factor and key in state_dict:
                # Set by torch.distributed.checkpoint.state_dict where there was nothing of that name.
                error_msgs.append(
                    f"{key!r} can't be loaded into a model that is split over processes: load it before, or save "
                    f"{own_key!r} from such a model"
                )
                return
            if factor.shape != self.factor.shape:
                error_msgs.append(f"{own_key!r} is {tuple(factor.shape)}, but here it is {tuple(self.factor.shape)}")
                return
        elif (weight := state_dict.get(key)) is not None:
            fits, weight = weight.shape == (self.out_features, self.in_features), whole_of(weight)
            factor = self._compacted(weight) if fits else None
            if factor is None or not (factor.is_meta or torch.equal(self._expanded(factor), weight)):
                error_msgs.append(
                    f"{key!r}, {tuple(weight.shape)}, is not a factor with the signs of {self.blocks} blocks at rank "
                    f"{min(self.factor.shape)}: load it into a model without block signs, or with those of its training"
                )
                return
        else:
            if strict:
                missing_keys.append(key)
            return
        with torch.no_grad():
            factor = split_as(factor, self.factor)
            if self.factor.is_meta:
                self.factor = nn.Parameter(factor.clone(), self.factor.requires_grad)
            else:
                self.factor.copy_(factor)


class SignedA(SignedFactor):
    """``lora_A``. It needs no signs: those are `SignedB`'s."""

    def __init__(self, factor: nn.Parameter, blocks: int, parts: int) -> None:
        super().__init__(factor, blocks, parts)
        r, self.in_features = factor.shape
        self.out_features = r * parts

    def forward(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... R"]:
        """The product with the ordinary factor.

        Args:
            x: the input.
        """
        return product_with_A(x, self.factor, self.parts)

    def _expanded(self, factor: Float[Tensor, "r n"]) -> Float[Tensor, "R n"]:
        return expanded_A(factor, self.parts)

    def _compacted(self, weight: Float[Tensor, "R n"]) -> Float[Tensor, "r n"]:
        return compact_A(weight, self.parts)


class SignedB(SignedFactor):
    """``lora_B``."""

    def __init__(self, factor: nn.Parameter, blocks: int, parts: int) -> None:
        super().__init__(factor, blocks, parts)
        self.out_features, r = factor.shape
        self.in_features = r * parts
        # No buffer: DistributedDataParallel would overwrite it between a forward and a backward pass.
        self._signs = self._signs_like(factor)

    def signs_like(self, like: Tensor) -> Float[Tensor, "k_out k_in"]:
        """The signs of the blocks.

        Args:
            like: a tensor of the dtype and device that they shall have.
        """
        if self._signs.device != like.device or self._signs.dtype != like.dtype:
            self._signs = self._signs_like(like)
        return self._signs

    def _signs_like(self, like: Tensor) -> Tensor:
        # As many columns as parts are divided into so many, and the signs depend on nothing else. Of inference mode,
        # they could be in no later backward pass.
        with torch.inference_mode(mode=False):
            signs = block_signs(self.out_features, self.parts, self.blocks, dtype=like.dtype, device=like.device)
        assert signs is not None
        return signs

    def forward(self, hidden: Float[Tensor, "... R"]) -> Float[Tensor, "... m"]:
        """The product with the ordinary factor.

        Args:
            hidden: what `SignedA` has made of the input.
        """
        return product_with_B(hidden, self.factor, self.signs_like(self.factor))

    def _expanded(self, factor: Float[Tensor, "m r"]) -> Float[Tensor, "m R"]:
        return expanded_B(factor, self.signs_like(factor))

    def _compacted(self, weight: Float[Tensor, "m R"]) -> Float[Tensor, "m r"]:
        return compact_B(weight, self.parts)


class SignedLinear(MixedIn):
    """Mixed into the class of PEFT's linear layers, so that a pass costs what LoRA's costs.

    PEFT's own forward pass would be right as well, but make the ordinary factors, and keep them for the backward pass.
    So would calls of the factors, but keep what LoRA of rank r·blocks keeps: they are called where something waits for
    it, as DeepSpeed's ZeRO-3 does to gather them.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward pass.

        Args:
            x: the layer's input, (…, n).
            args: as PEFT's.
            kwargs: as PEFT's.

        Returns:
            The layer's output, (…, m).
        """
        layer: Any = self
        names = layer.active_adapters
        of_A = layer.lora_A[names[0]] if len(names) == 1 and names[0] in layer.lora_A else None
        other = args or kwargs or x.is_nested or layer.disable_adapters or layer.merged
        if other or not isinstance(of_A, SignedA):
            of_peft: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return of_peft
        (name,) = names
        of_B = layer.lora_B[name]
        result = layer.base_layer(x)
        if not autocasts(x):  # PEFT casts to the adapter's float32 what autocast casts back: two passes over the input
            x = layer._cast_input_dtype(x, of_A.factor.dtype)
        x = layer.lora_dropout[name](x)
        output: Tensor
        if has_hooks(of_A) or has_hooks(of_B):
            output = result + of_B(of_A(x)) * layer.scaling[name]
        else:
            dtype, scaling = dtype_of_products(x), layer.scaling[name]
            A, B = of_A.factor.to(dtype), of_B.factor.to(dtype)
            if isinstance(scaling, Tensor):  # of peft.utils.hotswap.prepare_model_for_compiled_hotswap
                B, scaling = B * scaling.to(dtype), 1.0
            output = add_signed_linear(result, x.to(dtype), A, B, of_B.signs_like(B), scaling)
        return output.to(result.dtype)
