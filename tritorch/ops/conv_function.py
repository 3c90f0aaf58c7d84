"""Autograd functions of convolution and its gradients, of images or volumes: each is differentiated
by the others; and the library ops that they run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritorch import binding
from tritorch.ops import conv_weight
from tritorch.ops.activation_function import grad_preactivation, keeps_preactivation, save_product
from tritorch.ops.conv_dispatch import convolve
from tritorch.ops.geometry import Geometry, is_channels_last, memory_format
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
        preactivation: Tensor | None = None
        if keeps_preactivation(ctx, activation):
            output, preactivation = convolution_keeping(*arguments)
        else:
            output = convolution(*arguments)
        if not any(ctx.needs_input_grad):
            return output
        save_product(ctx, (input, weight, bias, residual), activation, output, preactivation)
        ctx.size, ctx.channels_last = size, channels_last
        describe(ctx, input, weight, geometry)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *operands, saved = ctx.saved_tensors
        rest = ctx.size, *ctx.geometry, ctx.channels_last, None
        grad_output = grad_preactivation(
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


def empty(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """An empty tensor of this shape, with the dtype and device of `like`."""
    order = memory_format(channels_last, len(shape) - 2)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=order)


def _output(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
    activation: str | None,
) -> Tensor:
    return empty(input, (input.shape[0], weight.shape[0], *size), channels_last)


def _flops(
    input: Sequence[int],
    weight: Sequence[int],
    bias: Any,
    residual: Any,
    size: Sequence[int],
    *geometry: Any,
    **out: Any,
) -> int:
    return 2 * input[0] * math.prod(size) * math.prod(weight)


@binding.library_op(
    "convolution(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, SymInt[] size, "
    "int[] stride, int[] padding, int[] dilation, int groups, bool channels_last, "
    "str? activation) -> Tensor",
    fake=_output,
    flops=_flops,
)
def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    size: Sequence[int],
    *given: Any,
) -> Tensor:
    y = _output(input, weight, bias, residual, size, *given)
    geometry, activation = Geometry.of(*given[:4]), given[-1]
    convolve(input, weight, bias, y, geometry, False, activation, None, residual)
    return y


def _outputs(input: Tensor, weight: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    return _output(input, weight, *given), _output(input, weight, *given)


@binding.library_op(
    "convolution_keeping(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, "
    "SymInt[] size, int[] stride, int[] padding, int[] dilation, int groups, "
    "bool channels_last, str activation) -> (Tensor, Tensor)",
    fake=_outputs,
    flops=_flops,
)
def convolution_keeping(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    size: Sequence[int],
    *given: Any,
) -> tuple[Tensor, Tensor]:
    """The same, and the activation's input, which the gradients of some activations need."""
    y, preactivation = _outputs(input, weight, bias, residual, size, *given)
    geometry, activation = Geometry.of(*given[:4]), given[-1]
    convolve(input, weight, bias, y, geometry, False, activation, preactivation, residual)
    return y, preactivation


def _grad_input(
    grad_output: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    shape = (grad_output.shape[0], weight.shape[1] * groups, *size)
    return empty(grad_output, shape, channels_last)


def _grad_input_flops(
    grad_output: Sequence[int], weight: Sequence[int], *given: Any, **out: Any
) -> int:
    return 2 * grad_output[0] * math.prod(grad_output[2:]) * math.prod(weight)


@binding.library_op(
    "convolution_grad_input(Tensor grad_output, Tensor weight, Tensor? bias, SymInt[] size, "
    "int[] stride, int[] padding, int[] dilation, int groups, bool channels_last) -> Tensor",
    fake=_grad_input,
    flops=_grad_input_flops,
)
def convolution_grad_input(
    grad_output: Tensor, weight: Tensor, bias: Tensor | None, size: Sequence[int], *given: Any
) -> Tensor:
    grad_input = _grad_input(grad_output, weight, bias, size, *given)
    geometry = Geometry.of(*given[:4])
    convolve(grad_output, weight, bias, grad_input, geometry, transposed=True)
    return grad_input


def _grad_weight(
    grad_output: Tensor,
    input: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    shape = (grad_output.shape[1], input.shape[1] // groups, *size)
    return empty(grad_output, shape, channels_last)


def _grad_weight_flops(
    grad_output: Sequence[int],
    input: Sequence[int],
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
    **out: Any,
) -> int:
    return 2 * math.prod(grad_output) * (input[1] // groups) * math.prod(size)


@binding.library_op(
    "convolution_grad_weight(Tensor grad_output, Tensor input, SymInt[] size, int[] stride, "
    "int[] padding, int[] dilation, int groups, bool channels_last) -> Tensor",
    fake=_grad_weight,
    flops=_grad_weight_flops,
)
def convolution_grad_weight(
    grad_output: Tensor, input: Tensor, size: Sequence[int], *given: Any
) -> Tensor:
    grad_weight = _grad_weight(grad_output, input, size, *given)
    conv_weight.grad_weight(grad_output, input, grad_weight, Geometry.of(*given[:4]))
    return grad_weight
