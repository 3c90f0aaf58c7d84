"""Autograd functions of convolution, of images or volumes: each is differentiated by the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritorch import binding
from tritorch.ops.activation_function import grad_before, keeps_before, save_product
from tritorch.ops.conv_library import (
    convolution,
    convolution_grad_input,
    convolution_grad_weight,
    convolution_keeping,
)
from tritorch.ops.geometry import is_channels_last
from tritorch.ops.reduce import ChannelSum

Ints = tuple[int, ...]


class Convolution(torch.autograd.Function):
    """Linear in image and filter: its gradients, and theirs, are the functions of this file.

    For an activation the output is kept, or its input where the derivative does not follow from the
    output.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        size: Ints,
        stride: Ints,
        padding: Ints,
        dilation: Ints,
        groups: int,
        channels_last: bool,
        activation: str | None = None,
    ) -> Tensor:
        geometry = stride, padding, dilation, groups
        arguments = input, weight, bias, residual, size, *geometry, channels_last, activation
        output: Tensor
        before: Tensor | None = None
        if keeps_before(ctx, activation):
            output, before = convolution_keeping(*arguments)
        else:
            output = convolution(*arguments)
        if not any(ctx.needs_input_grad):
            return output
        save_product(ctx, (input, weight, bias, residual), activation, output, before)
        ctx.size, ctx.channels_last = size, channels_last
        describe(ctx, input, weight, geometry)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *operands, saved = ctx.saved_tensors
        rest = ctx.size, *ctx.geometry, ctx.channels_last, None
        grad_output = grad_before(
            ctx, grad_output, saved, lambda: binding.apply(Convolution, *operands, *rest)
        )
        input, weight, *_ = operands
        grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = binding.apply(ChannelSum, grad_output, 1)
        grad_residual = grad_output if ctx.needs_input_grad[3] else None
        return *gradients(ctx, grad_output, input, weight), grad_bias, grad_residual, *(None,) * 7


def describe(
    ctx: Any, input: Tensor, weight: Tensor, geometry: tuple[Ints, Ints, Ints, int]
) -> None:
    """Sets on the context what `gradients` needs besides the tensors."""
    ctx.geometry = geometry
    ctx.input_size, ctx.input_format = input.shape[2:], is_channels_last(input)
    ctx.kernel_size, ctx.weight_format = weight.shape[2:], is_channels_last(weight)


def gradients(
    ctx: Any, grad_output: Tensor, input: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of input and weight, the first two arguments of the function, where needed."""
    grad_input = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_input = binding.apply(
            ConvolutionGradInput,
            grad_output,
            weight,
            None,
            ctx.input_size,
            *ctx.geometry,
            ctx.input_format,
        )
    if ctx.needs_input_grad[1]:
        grad_weight = binding.apply(
            ConvolutionGradWeight,
            grad_output,
            input,
            ctx.kernel_size,
            *ctx.geometry,
            ctx.weight_format,
        )
    return grad_input, grad_weight


class ConvolutionGradInput(torch.autograd.Function):
    """The transposed convolution; as a layer of its own it also adds a bias."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        size: Ints,
        stride: Ints,
        padding: Ints,
        dilation: Ints,
        groups: int,
        channels_last: bool,
    ) -> Tensor:
        binding.save_for_backward(
            ctx,
            grad_output if ctx.needs_input_grad[1] else None,
            weight if ctx.needs_input_grad[0] else None,
        )
        ctx.geometry = stride, padding, dilation, groups
        ctx.output_size, ctx.output_format = grad_output.shape[2:], is_channels_last(grad_output)
        ctx.kernel_size, ctx.weight_format = weight.shape[2:], is_channels_last(weight)
        output: Tensor = convolution_grad_input(
            grad_output, weight, bias, size, *ctx.geometry, channels_last
        )
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, weight = ctx.saved_tensors
        grad_grad_output = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_grad_output = binding.apply(
                Convolution,
                grad,
                weight,
                None,
                None,
                ctx.output_size,
                *ctx.geometry,
                ctx.output_format,
                None,
            )
        if ctx.needs_input_grad[1]:
            grad_weight = binding.apply(
                ConvolutionGradWeight,
                grad_output,
                grad,
                ctx.kernel_size,
                *ctx.geometry,
                ctx.weight_format,
            )
        if ctx.needs_input_grad[2]:
            grad_bias = binding.apply(ChannelSum, grad, 1)
        return grad_grad_output, grad_weight, grad_bias, *(None,) * 6


class ConvolutionGradWeight(torch.autograd.Function):
    """The gradient of the filter: image and gradient of the output, correlated over all pixels."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        input: Tensor,
        size: Ints,
        stride: Ints,
        padding: Ints,
        dilation: Ints,
        groups: int,
        channels_last: bool,
    ) -> Tensor:
        ctx.save_for_backward(
            grad_output if ctx.needs_input_grad[1] else None,
            input if ctx.needs_input_grad[0] else None,
        )
        ctx.geometry = stride, padding, dilation, groups
        ctx.output_size, ctx.output_format = grad_output.shape[2:], is_channels_last(grad_output)
        ctx.input_size, ctx.input_format = input.shape[2:], is_channels_last(input)
        output: Tensor = convolution_grad_weight(
            grad_output, input, size, *ctx.geometry, channels_last
        )
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, input = ctx.saved_tensors
        grad_grad_output = grad_input = None
        if ctx.needs_input_grad[0]:
            grad_grad_output = binding.apply(
                Convolution,
                input,
                grad,
                None,
                None,
                ctx.output_size,
                *ctx.geometry,
                ctx.output_format,
                None,
            )
        if ctx.needs_input_grad[1]:
            grad_input = binding.apply(
                ConvolutionGradInput,
                grad_output,
                grad,
                None,
                ctx.input_size,
                *ctx.geometry,
                ctx.input_format,
            )
        return grad_grad_output, grad_input, *(None,) * 6
