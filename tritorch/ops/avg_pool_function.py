"""Average pooling of images and volumes: launches, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritorch import binding, launch
from tritorch.ops import pool_rows, windows
from tritorch.ops.geometry import is_channels_last
from tritorch.ops.strided import Layout
from tritorch.ops.windows import Window

kernels = launch.kernels("pool")
kernels3d = launch.kernels("pool3d")
rows_kernels = launch.kernels("pool_rows")
window_kernels = launch.kernels("windows")


def _averages(
    input: Tensor,
    window: Window,
    size: Sequence[int],
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    shape = (*input.shape[:2], *size)
    return windows.empty(input, shape, is_channels_last(input), input.dtype)


@binding.library_op(
    "avg_pool_forward(Tensor input, int[] window, SymInt[] size, bool count_include_pad, "
    "int? divisor_override) -> Tensor",
    fake=_averages,
)
def _avg_pool_forward(
    input: Tensor,
    window: Window,
    size: Sequence[int],
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    y = _averages(input, window, size, count_include_pad, divisor_override)
    given = tuple(window), count_include_pad, divisor_override
    _plan_avg_pool(Layout.of(input), Layout.of(y), *given)(y, input, y)
    return y


@launch.planned
def _plan_avg_pool(
    input: Layout,
    y: Layout,
    window: Window,
    count_include_pad: bool,
    divisor_override: int | None,
) -> launch.Prepared:
    size = y.shape[2:]
    extents, stride, padding, _ = windows.split(window)
    divisor = divisor_override or 1
    means = {"COUNT_INCLUDE_PAD": count_include_pad, "HAS_DIVISOR": divisor_override is not None}
    kernel = rows_kernels.avg_pool_rows_forward_kernel
    rows = pool_rows.forward(kernel, input, y, window, (divisor,), **means)
    if rows is not None:
        return rows
    return windows.prepared(
        kernels.avg_pool2d_forward_kernel
        if len(size) == 2
        else kernels3d.avg_pool3d_forward_kernel,
        (*input.shape[1:], *size),
        input.shape[0] * math.prod(size),
        (input, y),
        (*stride, *padding, divisor),
        **windows.named("T R S", extents),
        UNROLL=window_kernels.unrolled_taps(*extents),
        **means,
    )


def _grad_averaged(
    grad_output: Tensor,
    window: Window,
    shape: Sequence[int],
    channels_last: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    return windows.empty(grad_output, shape, channels_last, grad_output.dtype)


@binding.library_op(
    "avg_pool_backward(Tensor grad_output, int[] window, SymInt[] shape, bool channels_last, "
    "bool count_include_pad, int? divisor_override) -> Tensor",
    fake=_grad_averaged,
)
def _avg_pool_backward(
    grad_output: Tensor,
    window: Window,
    shape: Sequence[int],
    channels_last: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    grad_input = windows.empty(grad_output, shape, channels_last, grad_output.dtype)
    given = tuple(window), count_include_pad, divisor_override
    run, taps = _plan_avg_pool_backward(Layout.of(grad_output), Layout.of(grad_input), *given)
    run(grad_input, grad_output, *taps, grad_input)
    return grad_input


@launch.planned
def _plan_avg_pool_backward(
    grad_output: Layout,
    grad_input: Layout,
    window: Window,
    count_include_pad: bool,
    divisor_override: int | None,
) -> tuple[launch.Prepared, tuple[None, ...]]:
    """The launch, and what its kernel takes for the taps of maxima."""
    (n, c, *pixels), size = grad_input.shape, grad_output.shape[2:]
    extents, stride, padding, dilation = windows.split(window)
    means = count_include_pad, divisor_override is not None
    rows = pool_rows.backward(grad_output, grad_input, window, divisor_override or 1, *means)
    if rows is not None:
        return rows, (None,)
    run = windows.prepared(
        kernels.avg_pool2d_backward_kernel
        if len(size) == 2
        else kernels3d.avg_pool3d_backward_kernel,
        (c, *pixels, *size),
        n * math.prod(pixels),
        (grad_output, grad_input),
        (*extents, *stride, *padding, divisor_override or 1),
        **windows.counts(tuple(map(window_kernels.windows_per_cell, extents, stride, dilation))),
        COUNT_INCLUDE_PAD=count_include_pad,
        HAS_DIVISOR=divisor_override is not None,
    )
    return run, ()


class AvgPool(torch.autograd.Function):
    """Linear in its input: keeps nothing but shapes."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        window: Window,
        size: Sequence[int],
        count_include_pad: bool,
        divisor_override: int | None,
    ) -> Tensor:
        divisor = count_include_pad, divisor_override
        output: Tensor = _avg_pool_forward(input, window, size, *divisor)
        if ctx.needs_input_grad[0]:
            ctx.window, ctx.divisor = window, divisor
            ctx.shape, ctx.channels_last = input.shape, is_channels_last(input)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad_input = binding.apply(
            AvgPoolBackward, grad_output, ctx.window, ctx.shape, ctx.channels_last, *ctx.divisor
        )
        return grad_input, None, None, None, None


class AvgPoolBackward(torch.autograd.Function):
    """The transpose of `AvgPool`: each is the other's gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        window: Window,
        shape: Sequence[int],
        channels_last: bool,
        count_include_pad: bool,
        divisor_override: int | None,
    ) -> Tensor:
        ctx.window, ctx.divisor = window, (count_include_pad, divisor_override)
        ctx.size = grad_output.shape[2:]
        grad_input: Tensor = _avg_pool_backward(
            grad_output, window, shape, channels_last, *ctx.divisor
        )
        return grad_input

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        grad_grad_output = binding.apply(AvgPool, grad, ctx.window, ctx.size, *ctx.divisor)
        return grad_grad_output, None, None, None, None, None


def avg_pool(
    input: Tensor,
    window: Window,
    size: Sequence[int],
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The kernels' means of images or volumes, batched or not, whose arguments are checked."""
    batched = input.dim() == len(size) + 2
    images = input if batched else input[None]
    output: Tensor = binding.apply(
        AvgPool, images, window, size, count_include_pad, divisor_override
    )
    return output if batched else output[0]
