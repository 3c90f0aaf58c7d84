"""Convolution of images or volumes and its gradients as library ops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tritorch import binding, launch
from tritorch.ops import depthwise, implicit_gemm
from tritorch.ops.geometry import Geometry, memory_format

kernels = launch.kernels("conv_weight")


def empty(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """An empty tensor of this shape, with the dtype and device of `like`."""
    order = memory_format(channels_last, len(shape) - 2)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=order)


def _convolve(weight: Tensor, groups: int) -> Callable[..., None]:
    if weight.shape[1] == 1 and depthwise.takes(weight, groups):
        return depthwise.convolve
    return implicit_gemm.convolve


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
    convolve = _convolve(weight, geometry.groups)
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
    y, before = _outputs(input, weight, bias, residual, size, *given)
    geometry, activation = Geometry.of(*given[:4]), given[-1]
    convolve = _convolve(weight, geometry.groups)
    convolve(input, weight, bias, y, geometry, False, activation, before, residual)
    return y, before


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
    convolve = _convolve(weight, geometry.groups)
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
    geometry = Geometry.of(*given[:4])
    partial: Tensor | None
    if depthwise.takes(grad_weight, geometry.groups):
        partial = depthwise.grad_weight(grad_output, input, grad_weight, geometry)
    else:
        partial = implicit_gemm.grad_weight(grad_output, input, grad_weight, geometry)
    if partial is not None:
        # with the channels last, as in the partial sums
        to = grad_weight.movedim(1, -1)
        _plan_sum(partial.shape[0], to.shape, to.stride())(grad_weight, partial, grad_weight)
    return grad_weight


@launch.planned
def _plan_sum(splits: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> launch.Prepared:
    # padded to the axes of a volume
    elements, padding = math.prod(shape), 5 - len(shape)
    sizes, along = shape[1:] + (1,) * padding, strides + (0,) * padding
    return launch.Prepared(
        kernels.conv2d_sum_weight_kernel,
        (math.ceil(elements / kernels.BLOCK),),
        (elements, splits, *sizes, *along),
        BLOCK=kernels.BLOCK,
    )
