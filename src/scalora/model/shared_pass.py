"""The adapter and a factored remainder in one pair of matrix products (paper, section 6): as much as a wider LoRA.

With the factors side by side, ``x → [lora_A; rightᵀ] → [s·lora_B, left]`` is the whole update. They are put together in
each pass, in the dtype of the products: that takes a share of 1/tokens of the products' time, whereas a copy kept for
the passes would take up to half as much memory as the remainder itself, which is in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from scalora.model.remainder_layer import RemainderLayer


def can_share(layer: RemainderLayer, adapter: str, x: Tensor) -> bool:
    """Whether an adapter of a linear layer and the remainder get the same input in the same dtype, and it pays.

    Args:
        layer: the PEFT layer.
        adapter: the adapter's name.
        x: the layer's input, (…, n).
    """
    dropout, lora_A = layer.lora_dropout[adapter], layer.lora_A[adapter]
    if not isinstance(dropout, nn.Identity) and (dropout.training or not isinstance(dropout, nn.Dropout)):
        return False
    if not torch.compiler.is_compiling():  # a compiled pass must not depend on the numbers of tokens and of columns
        # For few tokens, as when text is generated, putting the factors together takes longer than their products.
        columns = len(lora_A.weight) + layer.factored_remainder().columns
        if x.numel() < columns * x.shape[-1]:
            return False
    same_dtype = autocasts(x) or x.dtype == lora_A.weight.dtype == layer.lora_B[adapter].weight.dtype
    return same_dtype and _is_plain(lora_A) and _is_plain(layer.lora_B[adapter])


def autocasts(x: Tensor) -> bool:
    """Whether matrix products with a tensor are done in autocast's dtype.

    Args:
        x: the tensor.
    """
    kind = x.device.type
    return x.dtype != torch.float64 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _is_plain(module: nn.Module) -> bool:
    """Whether nobody would miss a call of the module: it is a product without bias, and no hook waits for its call."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    # Accelerate's hooks, which fetch offloaded weights, replace the method.
    return type(module) is nn.Linear and module.bias is None and not hooks and "forward" not in module.__dict__


def add_in_one_pass(
    result: Tensor,
    x: Tensor,
    adapter: tuple[Tensor, Tensor, float],
    remainder: tuple[Tensor, Tensor, float],
) -> Tensor:
    """Add the outputs of an adapter and of a remainder to a result, with gradients for it, x, and the adapter.

    Args:
        result: (…, m).
        x: the input, (…, n).
        adapter: ``lora_A``, (r, n), ``lora_B``, (m, r), and what their product is multiplied by.
        remainder: left, (m, k), and right, (n, k), which are frozen, and what their product is multiplied by.

    Returns:
        The sum, (…, m).
    """
    dtype = torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype
    rows, rows_of_result = x.reshape(-1, x.shape[-1]).to(dtype), result.reshape(-1, result.shape[-1])
    output, _ = _SharedPass.apply(rows_of_result, rows, *adapter, *remainder)  # type: ignore[no-untyped-call]
    return output.view(result.shape)  # type: ignore[no-any-return]


class _SharedPass(torch.autograd.Function):
    """Saves what LoRA's own backward pass needs and nothing for the remainder, whose factors have no gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        result: Tensor,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        left: Tensor,
        right: Tensor,
        remainder_scaling: float,
    ) -> tuple[Tensor, Tensor]:
        hidden = x @ _stacked(lora_A, right.mT, x.dtype).mT
        back = _stacked(lora_B.mT * scaling, _times(left.mT, remainder_scaling), x.dtype)
        # One operation, and in half precision one rounding.
        output = torch.addmm(result, hidden, back) if result.dtype == x.dtype else result + hidden @ back
        return output, hidden[:, : len(lora_A)].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        result, x, lora_A, lora_B, ctx.scaling, left, right, ctx.remainder_scaling = inputs
        ctx.dtype_of_result = result.dtype
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, lora_A, lora_B, left, right, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, left, right, hidden = ctx.saved_tensors
        for_result, for_x, for_A, for_B, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # for second derivatives, of which the saved product is no part
            hidden = x @ lora_A.to(x.dtype).mT
        grad_x = grad_A = grad_B = None
        of_products = grad.to(x.dtype)
        if for_x or for_A:
            back = _stacked(lora_B.mT * ctx.scaling, _times(left.mT, ctx.remainder_scaling), x.dtype)
            grad_hidden = of_products @ back.mT
            if for_x:
                grad_x = grad_hidden @ _stacked(lora_A, right.mT, x.dtype)
            if for_A:
                grad_A = (grad_hidden[:, : len(lora_A)].mT @ x).to(lora_A.dtype)
        if for_B:
            grad_B = ctx.scaling * (of_products.mT @ hidden).to(lora_B.dtype)
        grad_result = grad.to(ctx.dtype_of_result) if for_result else None
        return grad_result, grad_x, grad_A, grad_B, None, None, None, None


def _stacked(upper: Tensor, lower: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.cat([upper.to(dtype), lower.to(dtype)])


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor * factor
