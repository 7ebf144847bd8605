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
from torch.nn.functional import linear

from scalora.maths.block_signs import block_signs, compact_A, compact_B, expanded_A, expanded_B, signed_linear
from scalora.model.adapters import UnsupportedLayerError
from scalora.model.layers import is_distributed, is_partitioned
from scalora.model.made_factor import MadeFactor, refuse_to_write
from scalora.model.mixed_class import MixedIn
from scalora.model.shared_pass import autocasts, dtype_of_products, has_hooks

_SPLIT = (
    "factors with block signs can be neither split over processes (FSDP, ZeRO-3) nor copied to devices (DataParallel): "
    "train with DistributedDataParallel, or leave add_block_signs out"
)


class SignedFactor(nn.Module):
    """A factor of an update whose blocks have signs.

    Args:
        factor: what is trained: (r, n), or (m, r).
        blocks: the number of parts that the update's sides are divided into, a power of two.
        parts: the number of parts that the update's columns could be divided into.

    Raises:
        UnsupportedLayerError: FSDP splits the factor over processes.

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
        # So do FSDP1 and FSDP2 when they split a module's parameters (checked with torch 2.13).
        if name == "factor" and (is_distributed(value) or not isinstance(value, nn.Parameter)):
            raise UnsupportedLayerError(_SPLIT)
        super().__setattr__(name, value)

    @property
    def weight(self) -> Tensor:
        """The ordinary factor, made of the trained one at each call, to read; gradients go through it."""
        made = self.expanded(self.factor)
        return made if torch.compiler.is_compiling() else made.as_subclass(MadeFactor)

    def expanded(self, factor: Tensor) -> Tensor:
        """The ordinary factor for a trained one, as a tensor of its own.

        Args:
            factor: as the trained one.
        """
        raise NotImplementedError

    def compacted(self, weight: Tensor) -> Tensor:
        """The inverse of `expanded`, if `weight` is what that makes.

        Args:
            weight: the ordinary factor.
        """
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "... k"]) -> Float[Tensor, "... l"]:
        """The product with the ordinary factor.

        Args:
            x: the input.
        """
        return linear(x, self.expanded(self.factor))

    def extra_repr(self) -> str:
        """What is shown of the module beside its name."""
        return f"{', '.join(map(str, self.factor.shape))}, blocks={self.blocks}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
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
        if (factor := state_dict.get(own_key)) is not None:  # of a dict of `named_parameters()`
            if factor.shape != self.factor.shape:
                error_msgs.append(f"{own_key!r} is {tuple(factor.shape)}, but here it is {tuple(self.factor.shape)}")
                return
        elif (weight := state_dict.get(key)) is not None:
            fits = weight.shape == (self.out_features, self.in_features)
            factor = self.compacted(weight) if fits else None
            if factor is None or not torch.equal(self.expanded(factor), weight):
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

    def expanded(self, factor: Float[Tensor, "r n"]) -> Float[Tensor, "R n"]:
        """The ordinary factor for a trained one, which is block-diagonal.

        Args:
            factor: as the trained one.
        """
        return expanded_A(factor, self.parts)

    def compacted(self, weight: Float[Tensor, "R n"]) -> Float[Tensor, "r n"]:
        """The inverse of `expanded`, if `weight` is what that makes.

        Args:
            weight: the ordinary factor.
        """
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

    def expanded(self, factor: Float[Tensor, "m r"]) -> Float[Tensor, "m R"]:
        """The ordinary factor for a trained one, which has the signs.

        Args:
            factor: as the trained one.
        """
        return expanded_B(factor, self.signs_like(factor))

    def compacted(self, weight: Float[Tensor, "m R"]) -> Float[Tensor, "m r"]:
        """The inverse of `expanded`, if `weight` is what that makes.

        Args:
            weight: the ordinary factor.
        """
        return compact_B(weight, self.parts)


class SignedLinear(MixedIn):
    """Mixed into the class of PEFT's linear layers, so that a pass costs what LoRA's costs.

    PEFT's own forward pass would be right as well, but make the ordinary factors, and keep them for the backward pass.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward pass.

        Args:
            x: the layer's input, (…, n).
            args: as PEFT's.
            kwargs: as PEFT's.

        Returns:
            The layer's output, (…, m).

        Raises:
            UnsupportedLayerError: DeepSpeed's ZeRO-3 has split the factors over processes.
        """
        layer: Any = self
        names = layer.active_adapters
        of_A = layer.lora_A[names[0]] if len(names) == 1 and names[0] in layer.lora_A else None
        other = args or kwargs or x.is_nested or layer.disable_adapters or layer.merged
        if other or not isinstance(of_A, SignedA) or has_hooks(of_A) or has_hooks(layer.lora_B[names[0]]):
            of_peft: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return of_peft
        if is_partitioned(of_A.factor):
            raise UnsupportedLayerError(_SPLIT)
        (name,) = names
        of_B = layer.lora_B[name]
        result = layer.base_layer(x)
        if not autocasts(x):  # PEFT casts to the adapter's float32 what autocast casts back: two passes over the input
            x = layer._cast_input_dtype(x, of_A.factor.dtype)
        x = layer.lora_dropout[name](x)
        dtype = dtype_of_products(x)
        A, B = of_A.factor.to(dtype), of_B.factor.to(dtype)
        update = signed_linear(x.to(dtype), A, B, of_B.signs_like(B))
        output: Tensor = (result + update * layer.scaling[name]).to(result.dtype)
        return output
