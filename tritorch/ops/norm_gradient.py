"""Batch normalisation under autograd: what it keeps, its gradients, and theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritorch import binding
from tritorch.ops.activation import ActivationBackward
from tritorch.ops.norm_stages import (
    batch_norm_backward_elemt,
    batch_norm_backward_reduce,
    batch_norm_elemt,
    batch_norm_stats,
)
from tritorch.ops.reduce import accumulator_dtype


class BatchNorm(torch.autograd.Function):
    """Keeps the input and, per channel, mean, variance and weight; less if the gradients allow it.

    What a ReLU masks is found again from the input and the bias, and after a residual from the
    output, which torch's own ReLU would keep too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        training: bool,
        momentum: float,
        eps: float,
        activation: str | None,
    ) -> Tensor:
        of_input, of_weight, of_bias = ctx.needs_input_grad[:3]
        mean, var = running_mean, running_var
        if training:
            mean, var = batch_norm_stats(input, running_mean, running_var, momentum)
        elif of_input or of_weight or of_bias:
            # a training step may move the running ones before this call's gradient needs them
            mean, var = torch.stack((running_mean, running_var)).unbind()
        output: Tensor = batch_norm_elemt(input, residual, mean, var, weight, bias, eps, activation)
        masked = activation is not None and residual is not None
        masks = activation is not None and residual is None
        needs_input = training or masks or of_weight or of_bias
        ctx.save_for_backward(
            input if needs_input else None,
            weight,
            bias if masks else None,
            output if masked else None,
            mean,
            var,
        )
        ctx.training, ctx.eps, ctx.stride = training, eps, output.stride()
        ctx.activation = activation if masks else None
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        _, _, _, output, _, _ = ctx.saved_tensors
        of_input, of_weight, of_bias, of_residual = ctx.needs_input_grad[:4]
        if not (of_input or of_weight or of_bias):
            grad_residual = grad_output
            if output is not None:
                grad_residual = binding.apply(ActivationBackward, grad_output, output, "relu")
            return None, None, None, grad_residual, *(None,) * 6
        grads = binding.apply(
            BatchNormBackward,
            grad_output,
            *ctx.saved_tensors,
            (of_input, of_weight, of_bias),
            ctx.training,
            ctx.eps,
            ctx.stride,
            ctx.activation,
            ctx.bias_dtype,
        )
        masked = grad_output if output is None else grads[3]
        return *grads[:3], masked if of_residual else None, *(None,) * 6


class BatchNormBackward(torch.autograd.Function):
    """Gradients of input, weight and bias, and the masked one of the output where that is given.

    Their own gradients are plain PyTorch's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        input: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        output: Tensor | None,
        mean: Tensor,
        var: Tensor,
        wanted: tuple[bool, bool, bool],
        training: bool,
        eps: float,
        stride: tuple[int, ...],
        activation: str | None,
        bias_dtype: torch.dtype | None,
    ) -> tuple[Tensor | None, ...]:
        of_input, of_weight, of_bias = wanted
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output, input, weight, bias, output, mean, var)
        ctx.training, ctx.eps, ctx.activation = training, eps, activation
        grad, sums = grad_output, None
        if of_weight or of_bias or training:
            sums, masked = batch_norm_backward_reduce(
                grad_output, output, input, mean, var, weight, bias, eps, activation
            )
            grad = grad_output if output is None else masked
        elif output is not None:
            grad = binding.apply(ActivationBackward, grad_output, output, "relu")
        grad_input = grad_weight = grad_bias = None
        if of_input:
            grad_input = batch_norm_backward_elemt(
                grad,
                input if training or activation is not None else None,
                mean,
                var,
                weight,
                bias,
                sums if training else None,
                grad.numel() // grad.shape[1],
                stride,
                eps,
                activation,
            )
        if of_weight and weight is not None and sums is not None:
            grad_weight = sums[1].to(weight.dtype)
        if of_bias and sums is not None:
            grad_bias = sums[0].to(bias_dtype)
        return grad_input, grad_weight, grad_bias, None if output is None else grad

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_output, input, weight, bias, output, mean, var = ctx.saved_tensors
        if ctx.activation is not None:
            output = batch_norm_elemt(input, None, mean, var, weight, bias, ctx.eps, ctx.activation)
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            # views, so that a gradient ends here even if one of them was computed from another
            leaves = [
                tensor.view_as(tensor) if needed else tensor
                for tensor, needed in zip(
                    (grad_output, input, weight), ctx.needs_input_grad, strict=False
                )
            ]
            plain = _plain_gradients(
                leaves[0], leaves[1], leaves[2], output, mean, var, ctx.training, ctx.eps
            )
        pairs = [
            (value, grad)
            for value, grad in zip(plain, grads, strict=True)
            if value is not None and grad is not None and value.requires_grad
        ]
        ends = [i for i in range(3) if ctx.needs_input_grad[i]]
        found: list[Tensor | None] = [None] * 3
        if pairs:
            values, given = zip(*pairs, strict=True)
            results = torch.autograd.grad(
                values, [leaves[i] for i in ends], given, create_graph=again, allow_unused=True
            )
            for i, result in zip(ends, results, strict=True):
                found[i] = result
        return *found, *(None,) * 10


def _plain_gradients(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    output: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
) -> tuple[Tensor | None, ...]:
    """What `BatchNormBackward` computes, in plain PyTorch."""
    dtype = accumulator_dtype(grad_output.dtype)
    dims = [dim for dim in range(grad_output.dim()) if dim != 1]
    shape = [-1 if dim == 1 else 1 for dim in range(grad_output.dim())]
    grad = grad_output.to(dtype)
    if output is not None:
        grad = torch.where(output <= 0, 0.0, grad)
    mean, var = mean.view(shape).to(dtype), var.view(shape).to(dtype)
    if training and input is not None:
        var, mean = torch.var_mean(input.to(dtype), dims, correction=0, keepdim=True)
    invstd = (var + eps).rsqrt()
    scale = invstd if weight is None else invstd * weight.view(shape)
    grad_weight = None
    centred = grad
    if input is not None:
        normalised = (input.to(dtype) - mean) * invstd
        product = grad * normalised
        if weight is not None:
            grad_weight = product.sum(dims).to(weight.dtype)
        if training:
            centred = grad - grad.mean(dims, True) - normalised * product.mean(dims, True)
    return (
        (centred * scale).to(grad_output.dtype),
        grad_weight,
        grad.sum(dims),
        None if output is None else grad.to(grad_output.dtype),
    )
