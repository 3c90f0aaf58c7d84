"""Batch normalisation under autograd: what it keeps, its gradients, and theirs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tritorch import binding
from tritorch.ops import second_gradient
from tritorch.ops.activation import REFERENCES
from tritorch.ops.activation_function import ActivationBackward, needs_output
from tritorch.ops.batch_norm_stages import (
    batch_norm_backward_elemt,
    batch_norm_backward_reduce,
    batch_norm_elemt,
    batch_norm_elemt_bits,
    keeps_bits,
    unpacked,
)
from tritorch.ops.batch_norm_stats import batch_norm_stats
from tritorch.ops.reduce import accumulator_dtype


class BatchNorm(torch.autograd.Function):
    """Batch normalisation; `normalised` says what is kept for the gradients."""

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
        wanted = ctx.needs_input_grad[:4]
        if training:
            mean, var = batch_norm_stats(input, running_mean, running_var, momentum)
        elif any(wanted):
            # a training step may move the running statistics before this call's gradient needs them
            mean, var = torch.stack((running_mean, running_var)).unbind()
        else:
            mean, var = running_mean, running_var
        given = input, weight, bias, residual, mean, var, training, eps, activation
        output, kept = normalised(ctx, wanted, *given)
        binding.save_for_backward(ctx, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # read once: activation checkpoints allow no second read
        kept = ctx.saved_tensors
        return *gradients(ctx, ctx.needs_input_grad[:4], grad_output, *kept), *(None,) * 6


def normalised(
    ctx: Any,
    wanted: tuple[bool, bool, bool, bool],
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The output, and the tensors that the gradients need; `wanted` says which of those of input,
    weight, bias and residual are.

    Kept are the input and, per channel, mean, variance and weight; fewer if the gradients allow it.
    The activation's operand is computed again from these and the bias.  With a residual one more
    tensor is kept, as torch's own activation would: the output where the derivative follows from
    it, else the residual; where `keeps_bits` says so, only a bit of each element of relu's output.
    """
    of_input, of_weight, of_bias, _ = wanted
    given = input, residual, mean, var, weight, bias, eps, activation
    output: Tensor
    saved, computes_again = None, False
    # without sums the gradients read nothing but the output
    sums = of_weight or of_bias or (training and of_input)
    if sums and residual is not None and keeps_bits(input, residual, activation):
        output, saved = batch_norm_elemt_bits(*given)
    else:
        output = batch_norm_elemt(*given)
        if activation is not None:
            from_output = residual is not None and needs_output(activation)
            saved = output if from_output else residual
            computes_again = not from_output
    needs_input = training or computes_again or of_weight or of_bias
    ctx.training, ctx.eps, ctx.activation = training, eps, activation
    ctx.stride = output.stride()
    ctx.bias_dtype = None if bias is None else bias.dtype
    kept_bias = bias if computes_again else None
    return output, (input if needs_input else None, weight, kept_bias, saved, mean, var)


def gradients(
    ctx: Any,
    wanted: tuple[bool, bool, bool, bool],
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor | None,
    mean: Tensor,
    var: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight, bias and residual, from what `normalised` set and kept."""
    of_input, of_weight, of_bias, of_residual = wanted
    if not (of_input or of_weight or of_bias):
        if ctx.activation is None:
            return None, None, None, grad_output
        if needs_output(ctx.activation):
            masked = binding.apply(ActivationBackward, grad_output, saved, ctx.activation)
            return None, None, None, masked
    *grads, masked = binding.apply(
        BatchNormBackward,
        grad_output,
        input,
        weight,
        bias,
        saved,
        mean,
        var,
        (of_input, of_weight, of_bias),
        ctx.training,
        ctx.eps,
        ctx.stride,
        ctx.activation,
        ctx.bias_dtype,
    )
    if saved is None:
        masked = grad_output
    return *grads, masked if of_residual else None


class BatchNormBackward(torch.autograd.Function):
    """Gradients of input, weight and bias, and with `saved` the gradient before the activation.

    Gradients of these gradients are computed by plain PyTorch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        input: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        saved: Tensor | None,
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
        ctx.save_for_backward(grad_output, input, weight, bias, saved, mean, var)
        ctx.training, ctx.eps, ctx.activation = training, eps, activation
        grad, sums = grad_output, None
        if of_weight or of_bias or training or (saved is not None and input is not None):
            sums, grad = batch_norm_backward_reduce(
                grad_output, saved, input, mean, var, weight, bias, eps, activation
            )
        elif saved is not None:
            grad = binding.apply(ActivationBackward, grad_output, saved, activation)
        if saved is None:
            grad = grad_output
        else:
            activation = None
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
        return grad_input, grad_weight, grad_bias, None if saved is None else grad

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, mean, var = ctx.saved_tensors
        plain = functools.partial(
            _plain_gradients,
            mean=mean,
            var=var,
            training=ctx.training,
            eps=ctx.eps,
            activation=ctx.activation,
        )
        found = second_gradient.through(plain, tensors, ctx.needs_input_grad[:5], grads)
        return *found, *(None,) * 8


def _plain_gradients(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor | None,
    *,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
    activation: str | None,
) -> tuple[Tensor | None, ...]:
    """What `BatchNormBackward` computes, in plain PyTorch."""
    dtype = accumulator_dtype(grad_output.dtype)
    dims = [dim for dim in range(grad_output.dim()) if dim != 1]
    shape = [-1 if dim == 1 else 1 for dim in range(grad_output.dim())]
    mean, var = mean.view(shape).to(dtype), var.view(shape).to(dtype)
    if training and input is not None:
        var, mean = torch.var_mean(input.to(dtype), dims, correction=0, keepdim=True)
    invstd = (var + eps).rsqrt()
    scale = invstd if weight is None else invstd * weight.view(shape)
    normalised = None if input is None else (input.to(dtype) - mean) * invstd
    grad = grad_output.to(dtype)
    if saved is not None and saved.dtype == torch.uint8:
        grad = grad.masked_fill(~unpacked(saved, grad.shape), 0)
    elif activation is not None and saved is not None and needs_output(activation):
        grad = binding.apply(ActivationBackward, grad, saved.to(dtype), activation)
    elif activation is not None and input is not None:
        y = (input.to(dtype) - mean) * scale
        y = y if bias is None else y + bias.view(shape)
        y = y if saved is None else y + saved
        y = y if y.requires_grad else y.requires_grad_()
        activated = REFERENCES[activation](y)
        (grad,) = torch.autograd.grad(activated, y, grad, create_graph=True)
    grad_weight = None
    centred = grad
    if normalised is not None:
        product = grad * normalised
        if weight is not None:
            grad_weight = product.sum(dims).to(weight.dtype)
        if training:
            centred = grad - grad.mean(dims, True) - normalised * product.mean(dims, True)
    return (
        (centred * scale).to(grad_output.dtype),
        grad_weight,
        grad.sum(dims),
        None if saved is None else grad.to(grad_output.dtype),
    )
