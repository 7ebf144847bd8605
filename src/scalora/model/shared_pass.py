"""The adapter and a factored remainder in one pair of matrix products (paper, section 6): as much as a wider LoRA.

With the factors side by side, ``x → [lora_A; rightᵀ] → [s·lora_B, left]`` is the whole update. They are put together in
each pass, in the dtype of the products: that takes a share of 1/tokens of the products' time, whereas a copy kept for
the passes would take up to half as much memory as the remainder itself, which is in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


def can_share(lora_A: nn.Module, lora_B: nn.Module, dropout: nn.Module, columns: int, x: Tensor) -> bool:
    """Whether an adapter of a linear layer and the remainder get the same input in the same dtype, and it pays.

    Args:
        lora_A: PEFT's module of that name.
        lora_B: PEFT's module of that name.
        dropout: the adapter's dropout.
        columns: columns of the remainder that are in use.
        x: the layer's input, (…, n).
    """
    if not isinstance(dropout, nn.Identity) and (dropout.training or not isinstance(dropout, nn.Dropout)):
        return False
    if not (_is_plain(lora_A) and _is_plain(lora_B)):
        return False
    of_A, of_B = lora_A.weight, lora_B.weight
    assert isinstance(of_A, Tensor)
    assert isinstance(of_B, Tensor)
    if not torch.compiler.is_compiling():  # a compiled pass must not depend on the numbers of tokens and of columns
        # For few tokens, as when text is generated, putting the factors together takes longer than their products.
        too_few = x.numel() < (len(of_A) + columns) * x.shape[-1]
        # The transforms of torch.func take no function of ours without rules for each of them; it has no public name.
        if too_few or torch._C._are_functorch_transforms_active():
            return False
    return x.dtype == of_A.dtype == of_B.dtype or autocasts(x)


def autocasts(x: Tensor) -> bool:
    """Whether matrix products with a tensor are done in autocast's dtype.

    Args:
        x: the tensor.
    """
    kind = x.device.type
    return x.dtype != torch.float64 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def dtype_of_products(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products with a tensor are done: autocast's, or its own.

    Args:
        x: the tensor.
    """
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def rows_of(tensor: Tensor) -> Tensor:
    """A tensor (…, k) as a matrix (rows, k).

    Args:
        tensor: the tensor.
    """
    return tensor.reshape(-1, tensor.shape[-1])


def _is_plain(module: nn.Module) -> bool:
    """Whether nobody would miss a call of the module: it is a product without bias, and no hook waits for its call."""
    return type(module) is nn.Linear and module.bias is None and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether something waits for calls of a module, and would miss one that is left out.

    Args:
        module: the module.
    """
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    # Accelerate's hooks, which fetch offloaded weights, replace the method.
    return bool(hooks) or "forward" in module.__dict__


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
    output: Tensor = _SharedPass.apply(result, x.to(dtype_of_products(x)), *adapter, *remainder)  # type: ignore[no-untyped-call]
    return output.view(result.shape)  # a view that a function makes may not be changed in place


class _SharedPass(torch.autograd.Function):
    """Saves what LoRA's own backward pass needs and nothing for the remainder, whose factors have no gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        result: Tensor,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        left: Tensor,
        right: Tensor,
        remainder_scaling: float,
    ) -> Tensor:
        hidden = linear(rows_of(x), _stacked(lora_A, right.mT, x.dtype))
        back = _stacked(times(lora_B.mT, scaling), times(left.mT, remainder_scaling), x.dtype)
        ctx.scaling, ctx.remainder_scaling, ctx.dtype_of_result = scaling, remainder_scaling, result.dtype
        ctx.save_for_backward(x, lora_A, lora_B, left, right, hidden[:, : len(lora_A)].clone())
        ctx.shape_of_result, rows = result.shape, rows_of(result)
        # One operation, and in half precision one rounding.
        return torch.addmm(rows, hidden, back) if rows.dtype == x.dtype else rows + hidden @ back

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, lora_B, left, right, hidden = ctx.saved_tensors
        for_result, for_x, for_A, for_B, *_ = ctx.needs_input_grad
        rows = rows_of(x)
        if torch.is_grad_enabled():  # for second derivatives, of which the saved product is no part
            hidden = linear(rows, lora_A.to(x.dtype))
        grad_x = grad_A = grad_B = None
        of_products = grad.to(x.dtype)
        if for_x or for_A:
            back = _stacked(times(lora_B.mT, ctx.scaling), times(left.mT, ctx.remainder_scaling), x.dtype)
            grad_hidden = linear(of_products, back)
            if for_x:
                grad_x = (grad_hidden @ _stacked(lora_A, right.mT, x.dtype)).view(x.shape)
            if for_A:
                grad_A = (grad_hidden[:, : len(lora_A)].mT @ rows).to(lora_A.dtype)
        if for_B:
            grad_B = times((of_products.mT @ hidden).to(lora_B.dtype), ctx.scaling)
        grad_result = grad.to(ctx.dtype_of_result).reshape(ctx.shape_of_result) if for_result else None
        return grad_result, grad_x, grad_A, grad_B, None, None, None, None


def _stacked(upper: Tensor, lower: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.cat([upper, lower]).to(dtype)


def times(tensor: Tensor, factor: float) -> Tensor:
    """A tensor multiplied by a number; the tensor itself if that is 1.

    Args:
        tensor: the tensor.
        factor: the number.
    """
    return tensor if factor == 1 else tensor * factor
