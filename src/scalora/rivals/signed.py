"""LoRA with random signs: ``W + s·S ⊙ (B·A)``, where S has an entry of ±1 for each entry of W.

Not from a paper; HiRA, ``W + W ⊙ (B·A)``, is its nearest relative. A step of LoRA moves W by a matrix of rank 2r at
most, whose largest singular value is large for the size of its entries. With signs that have nothing to do with A and
B, the same entries make a matrix of full rank. For n × n its largest singular value is smaller by about ``√(n/(8r))``,
so that larger steps are possible, and the update's rank is not limited at all.

The update is computed as a whole matrix, as is its gradient, in every pass. So it takes LoRA's memory for the optimizer
and one byte for each entry of an adapted weight, and more time than full fine-tuning. As a pair of factors without the
signs would be another update, both are one parameter, which plain PEFT refuses to load as LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int8
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from scalora.model.shared_pass import dtype_of_products, rows_of
from scalora.rescale.stochastic import draws, hash_of
from scalora.rivals.own_update import OwnUpdate, ReplacesUpdate

_SIGNS = "signs"


@dataclass(frozen=True)
class Signed(ReplacesUpdate):
    """LoRA with random signs. Its settings under ``lora:`` are LoRA's."""

    title: ClassVar[str] = "LoRA with random signs"

    def replace_update(self, name: str, layer: LoraLayer, adapter: str) -> None:
        """Give the product of the factors signs.

        Args:
            name: the layer's name.
            layer: the PEFT layer.
            adapter: the adapter's name.
        """
        lora_A = layer.lora_A[adapter].weight
        factors = nn.Linear(layer.in_features + layer.out_features, len(lora_A), bias=False).to(lora_A)
        with torch.no_grad():
            factors.weight.zero_()
            factors.weight[:, : layer.in_features] = lora_A
        layer.lora_A[adapter], layer.lora_B[adapter] = factors, nn.Identity()
        layer.lora_variant[adapter] = _Signed()
        layer.register_buffer(_SIGNS, signs_of(name, layer.get_base_layer().weight), persistent=False)


def signs_of(name: str, weight: Tensor) -> Int8[Tensor, "m n"]:
    """The signs of a layer: the same in each process and each run.

    Args:
        name: the layer's name.
        weight: its weight.
    """
    return 1 - 2 * draws(hash_of(name), 0, 0, weight).bitwise_right_shift_(15).to(torch.int8)


class _Signed(OwnUpdate):
    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        x = module.lora_dropout[active_adapter](x)
        dtype = dtype_of_products(x)
        A, B = (factor.to(dtype) for factor in _factors(module, active_adapter))
        signs, scaling = module.get_buffer(_SIGNS), module.scaling[active_adapter]
        output: Tensor = _Product.apply(x.to(dtype), A, B, signs, scaling)  # type: ignore[no-untyped-call]
        return result + output

    @torch.no_grad()
    def update(self, module: LoraLayer, adapter: str) -> Float[Tensor, "m n"]:
        A, B = _factors(module, adapter)
        return _signed(B @ A, module.get_buffer(_SIGNS), module.scaling[adapter])


class _Product(torch.autograd.Function):
    """``x · (s·S ⊙ (B·A))ᵀ``, of which only x and the factors are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, signs: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(x, A, B, signs)
        ctx.scaling = scaling
        return x @ _signed(B @ A, signs, scaling).mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, signs = ctx.saved_tensors
        grad = grad.to(x.dtype)
        grad_x = grad @ _signed(B @ A, signs, ctx.scaling) if ctx.needs_input_grad[0] else None
        of_weight = _signed(rows_of(grad).mT @ rows_of(x), signs, ctx.scaling)
        return grad_x, B.mT @ of_weight, of_weight @ A.mT, None, None


def _signed(matrix: Float[Tensor, "m n"], signs: Int8[Tensor, "m n"], scaling: float) -> Float[Tensor, "m n"]:
    """The matrix, overwritten, with other signs and multiplied by a number."""
    return matrix.mul_(signs).mul_(scaling)


def _factors(layer: LoraLayer, adapter: str) -> tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]]:
    both = layer.lora_A[adapter].weight
    return both[:, : layer.in_features], both[:, layer.in_features :].mT
