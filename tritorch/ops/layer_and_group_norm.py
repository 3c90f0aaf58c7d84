"""Norms of each element of a batch by itself, under autograd: over its rows, or its groups.

Layer and group normalisation keep, compute and want the same; `norm` says which of them it is.
`extent` is the number of dimensions of a row, or that of groups.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tritorch import binding
from tritorch.ops import group_norm_function, layer_norm_function, second_gradient

_FORWARD = {
    "group_norm": group_norm_function.group_norm_forward,
    "layer_norm": layer_norm_function.layer_norm_forward,
}
_BACKWARD = {
    "group_norm": group_norm_function.group_norm_backward,
    "layer_norm": layer_norm_function.layer_norm_backward,
}
_PLAIN = {
    "group_norm": group_norm_function.plain_gradients,
    "layer_norm": layer_norm_function.plain_gradients,
}


class Norm(torch.autograd.Function):
    """Keeps the input, the weight, and mean and rstd of each row or group, as torch does."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        norm: str,
        extent: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        output: Tensor
        output, mean, rstd = _FORWARD[norm](input, extent, weight, bias, eps)
        if not any(ctx.needs_input_grad):
            return output
        binding.save_for_backward(ctx, input, weight, mean, rstd)
        ctx.norm, ctx.extent, ctx.eps = norm, extent, eps
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        of_input, _, _, of_weight, of_bias, _ = ctx.needs_input_grad
        grad_input, grad_weight, grad_bias = binding.apply(
            NormBackward,
            grad_output,
            *ctx.saved_tensors,
            ctx.norm,
            ctx.extent,
            ctx.eps,
            ctx.bias_dtype,
            (of_input, of_weight, of_bias),
        )
        return grad_input, None, None, grad_weight, grad_bias, None


class NormBackward(torch.autograd.Function):
    """Gradients of input, weight and bias; their own gradients are plain PyTorch's."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        norm: str,
        extent: int,
        eps: float,
        bias_dtype: torch.dtype | None,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        of_input, of_weight, of_bias = wanted
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output, input, weight)
        ctx.norm, ctx.extent, ctx.eps = norm, extent, eps
        grad_input, grads = _BACKWARD[norm](
            grad_output, input, extent, weight, mean, rstd, of_input, of_weight or of_bias
        )
        grad_weight = grad_bias = None
        if of_weight and weight is not None:
            grad_weight = grads[1].to(weight.dtype)
        if of_bias:
            grad_bias = grads[0].to(bias_dtype)
        return grad_input if of_input else None, grad_weight, grad_bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plain = functools.partial(_PLAIN[ctx.norm], extent=ctx.extent, eps=ctx.eps)
        wanted = ctx.needs_input_grad[:3]
        found = second_gradient.through(plain, ctx.saved_tensors, wanted, grads)
        return *found, *(None,) * 7
