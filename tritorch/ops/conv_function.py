"""Convolution of images and its gradients: library ops, and functions made of each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tritorch import binding, launch
from tritorch.ops import depthwise, implicit_gemm
from tritorch.ops.geometry import Geometry, is_channels_last, memory_format
from tritorch.ops.reduce import ChannelSum

kernels = launch.kernels("conv")


def _empty(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=memory_format(channels_last)
    )


def _convolve(weight: Tensor, groups: int) -> Callable[..., None]:
    return depthwise.convolve if depthwise.takes(weight, groups) else implicit_gemm.convolve


def _output(
    input: Tensor, weight: Tensor, bias: Tensor | None, size: Sequence[int], *geometry: Any
) -> Tensor:
    channels_last = is_channels_last(input) or is_channels_last(weight)
    return _empty(input, (input.shape[0], weight.shape[0], *size), channels_last)


def _flops(
    input: Sequence[int],
    weight: Sequence[int],
    bias: Any,
    size: Sequence[int],
    *geometry: Any,
    **out: Any,
) -> int:
    return 2 * input[0] * math.prod(size) * math.prod(weight)


@binding.library_op(
    "conv2d(Tensor input, Tensor weight, Tensor? bias, SymInt[2] size, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor",
    fake=_output,
    flops=_flops,
)
def _conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, size: Sequence[int], *geometry: Any
) -> Tensor:
    y = _output(input, weight, bias, size)
    shape = Geometry.of(*geometry)
    _convolve(weight, shape.groups)(input, weight, bias, y, shape, transposed=False)
    return y


def _grad_input(
    grad_output: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    shape = (grad_output.shape[0], weight.shape[1] * groups, *size)
    return _empty(grad_output, shape, channels_last)


def _grad_input_flops(
    grad_output: Sequence[int], weight: Sequence[int], *geometry: Any, **out: Any
) -> int:
    return 2 * grad_output[0] * math.prod(grad_output[2:]) * math.prod(weight)


@binding.library_op(
    "conv2d_grad_input(Tensor grad_output, Tensor weight, SymInt[2] size, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, bool channels_last) -> Tensor",
    fake=_grad_input,
    flops=_grad_input_flops,
)
def _conv2d_grad_input(
    grad_output: Tensor, weight: Tensor, size: Sequence[int], *geometry: Any
) -> Tensor:
    grad_input = _grad_input(grad_output, weight, size, *geometry)
    shape = Geometry.of(*geometry[:-1])
    _convolve(weight, shape.groups)(grad_output, weight, None, grad_input, shape, transposed=True)
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
    return _empty(grad_output, shape, channels_last)


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
    "conv2d_grad_weight(Tensor grad_output, Tensor input, SymInt[2] size, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, bool channels_last) -> Tensor",
    fake=_grad_weight,
    flops=_grad_weight_flops,
)
def _conv2d_grad_weight(
    grad_output: Tensor, input: Tensor, size: Sequence[int], *geometry: Any
) -> Tensor:
    grad_weight = _grad_weight(grad_output, input, size, *geometry)
    shape = Geometry.of(*geometry[:-1])
    partial: Tensor | None
    if depthwise.takes(grad_weight, shape.groups):
        partial = depthwise.grad_weight(grad_output, input, grad_weight, shape)
    else:
        partial = implicit_gemm.grad_weight(grad_output, input, grad_weight, shape)
    if partial is not None:
        launch.run(
            kernels.conv2d_sum_weight_kernel,
            (math.ceil(grad_weight.numel() / kernels.BLOCK),),
            partial,
            grad_weight,
            grad_weight.numel(),
            partial.shape[0],
            *partial.shape[2:],
            *grad_weight.stride(),
            on=grad_weight,
            BLOCK=kernels.BLOCK,
        )
    return grad_weight


class Conv2d(torch.autograd.Function):
    """Linear in image and filter: its gradients, and theirs, are the functions of this file."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(
            input if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None
        )
        ctx.geometry = stride, padding, dilation, groups
        ctx.input_size, ctx.input_format = input.shape[2:], is_channels_last(input)
        ctx.kernel_size, ctx.weight_format = weight.shape[2:], is_channels_last(weight)
        output: Tensor = _conv2d(input, weight, bias, size, *ctx.geometry)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = binding.apply(
                Conv2dGradInput,
                grad_output,
                weight,
                ctx.input_size,
                *ctx.geometry,
                ctx.input_format,
            )
        if ctx.needs_input_grad[1]:
            grad_weight = binding.apply(
                Conv2dGradWeight,
                grad_output,
                input,
                ctx.kernel_size,
                *ctx.geometry,
                ctx.weight_format,
            )
        if ctx.needs_input_grad[2]:
            grad_bias = binding.apply(ChannelSum, grad_output, 1)
        return grad_input, grad_weight, grad_bias, None, None, None, None, None


class Conv2dGradInput(torch.autograd.Function):
    """The transposed convolution."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        weight: Tensor,
        size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        channels_last: bool,
    ) -> Tensor:
        ctx.save_for_backward(
            grad_output if ctx.needs_input_grad[1] else None,
            weight if ctx.needs_input_grad[0] else None,
        )
        ctx.geometry = stride, padding, dilation, groups
        ctx.output_size = grad_output.shape[2:]
        ctx.kernel_size, ctx.weight_format = weight.shape[2:], is_channels_last(weight)
        output: Tensor = _conv2d_grad_input(grad_output, weight, size, *ctx.geometry, channels_last)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, weight = ctx.saved_tensors
        grad_grad_output = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_grad_output = binding.apply(
                Conv2d, grad, weight, None, ctx.output_size, *ctx.geometry
            )
        if ctx.needs_input_grad[1]:
            grad_weight = binding.apply(
                Conv2dGradWeight,
                grad_output,
                grad,
                ctx.kernel_size,
                *ctx.geometry,
                ctx.weight_format,
            )
        return grad_grad_output, grad_weight, None, None, None, None, None, None


class Conv2dGradWeight(torch.autograd.Function):
    """The correlation of an image with a gradient of the output, over all pixels."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        input: Tensor,
        size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        channels_last: bool,
    ) -> Tensor:
        ctx.save_for_backward(
            grad_output if ctx.needs_input_grad[1] else None,
            input if ctx.needs_input_grad[0] else None,
        )
        ctx.geometry = stride, padding, dilation, groups
        ctx.output_size = grad_output.shape[2:]
        ctx.input_size, ctx.input_format = input.shape[2:], is_channels_last(input)
        output: Tensor = _conv2d_grad_weight(grad_output, input, size, *ctx.geometry, channels_last)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, input = ctx.saved_tensors
        grad_grad_output = grad_input = None
        if ctx.needs_input_grad[0]:
            grad_grad_output = binding.apply(
                Conv2d, input, grad, None, ctx.output_size, *ctx.geometry
            )
        if ctx.needs_input_grad[1]:
            grad_input = binding.apply(
                Conv2dGradInput, grad_output, grad, ctx.input_size, *ctx.geometry, ctx.input_format
            )
        return grad_grad_output, grad_input, None, None, None, None, None, None
