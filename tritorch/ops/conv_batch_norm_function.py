"""Convolution with the statistics of its output: a library op, and its function under autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritorch import binding
from tritorch.ops import depthwise, implicit_gemm
from tritorch.ops.conv_function import Ints, describe, gradients
from tritorch.ops.conv_library import empty
from tritorch.ops.geometry import Geometry
from tritorch.ops.norm_stages import batch_norm_gather_stats, batch_norm_stats
from tritorch.ops.reduce import accumulator_dtype


def _outputs(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor]:
    y = empty(input, (input.shape[0], weight.shape[0], *size), channels_last)
    dtype = accumulator_dtype(input.dtype)
    mean, var = (input.new_empty((weight.shape[0],), dtype=dtype) for _ in range(2))
    return y, mean, var


def _flops(
    input: Sequence[int],
    weight: Sequence[int],
    running_mean: Any,
    running_var: Any,
    size: Sequence[int],
    *given: Any,
    **out: Any,
) -> int:
    return 2 * input[0] * math.prod(size) * math.prod(weight)


@binding.library_op(
    "convolution_batch_norm_stats(Tensor input, Tensor weight, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, SymInt[] size, int[] stride, int[] padding, int[] dilation, "
    "int groups, bool channels_last, float momentum) -> (Tensor, Tensor, Tensor)",
    fake=_outputs,
    flops=_flops,
)
def _convolution_batch_norm_stats(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution, and mean and biased variance of each channel of it as it is stored; moves
    the running ones once.
    """
    y = empty(input, (input.shape[0], weight.shape[0], *size), channels_last)
    geometry = Geometry.of(stride, padding, dilation, groups)
    moments = None
    if depthwise.takes(weight, groups):
        depthwise.convolve(input, weight, None, y, geometry, transposed=False)
    else:
        moments = implicit_gemm.convolve_with_moments(input, weight, y, geometry)
    running = running_mean, running_var, momentum
    if moments is None:
        return y, *batch_norm_stats(y, *running)
    return y, *batch_norm_gather_stats(moments, *running)


class ConvolutionStatistics(torch.autograd.Function):
    """A convolution without bias; mean and variance of its output tell no gradient.

    Batch normalisation by these has a gradient that knows what they depend on.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        size: Ints,
        stride: Ints,
        padding: Ints,
        dilation: Ints,
        groups: int,
        channels_last: bool,
        momentum: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        geometry = stride, padding, dilation, groups
        output, mean, var = _convolution_batch_norm_stats(
            input, weight, running_mean, running_var, size, *geometry, channels_last, momentum
        )
        ctx.mark_non_differentiable(mean, var)
        # or it would make zeros for these two
        ctx.set_materialize_grads(False)
        binding.save_for_backward(
            ctx,
            input if ctx.needs_input_grad[1] else None,
            weight if ctx.needs_input_grad[0] else None,
        )
        describe(ctx, input, weight, geometry)
        return output, mean, var

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        return *gradients(ctx, grad_output, *ctx.saved_tensors), *(None,) * 9
