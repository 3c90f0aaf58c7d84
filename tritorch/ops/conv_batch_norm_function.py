"""Convolution with the statistics of its output, and batch normalisation by them: a library op, and
its function under autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritorch import binding
from tritorch.ops import batch_norm_function, conv_dispatch, conv_function
from tritorch.ops.batch_norm_function import normalised
from tritorch.ops.batch_norm_stats import batch_norm_gather_stats, batch_norm_stats
from tritorch.ops.conv_function import Convolution, Ints, describe, empty
from tritorch.ops.geometry import Geometry
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
    """The convolution, and mean and biased variance of each channel as stored; moves the running
    statistics once.
    """
    y = empty(input, (input.shape[0], weight.shape[0], *size), channels_last)
    geometry = Geometry.of(stride, padding, dilation, groups)
    moments = conv_dispatch.convolve_with_moments(input, weight, y, geometry)
    running = running_mean, running_var, momentum
    if moments is None:
        return y, *batch_norm_stats(y, *running)
    return y, *batch_norm_gather_stats(moments, *running)


class ConvolutionBatchNorm(torch.autograd.Function):
    """Batch normalisation of a convolution without bias, in training, as one node of the graph.

    It keeps what the two would keep.  Of gradients of gradients the convolution is computed again,
    for what lies inside of a node has no graph.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        size: Ints,
        stride: Ints,
        padding: Ints,
        dilation: Ints,
        groups: int,
        channels_last: bool,
        momentum: float,
        eps: float,
        activation: str | None,
    ) -> Tensor:
        geometry = stride, padding, dilation, groups
        y, mean, var = _convolution_batch_norm_stats(
            input, weight, running_mean, running_var, size, *geometry, channels_last, momentum
        )
        given = y, norm_weight, norm_bias, residual, mean, var, True, eps, activation
        output, kept = normalised(ctx, _wanted(ctx), *given)
        operands = (input, weight) if any(ctx.needs_input_grad[:2]) else (None, None)
        binding.save_for_backward(ctx, *operands, *kept)
        ctx.size, ctx.channels_last = size, channels_last
        describe(ctx, input, weight, geometry)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, y, *kept = ctx.saved_tensors
        wanted = _wanted(ctx)
        if wanted[0] and torch.is_grad_enabled():
            rest = ctx.size, *ctx.geometry, ctx.channels_last
            y = binding.apply(Convolution, input, weight, None, None, *rest)
        grad_y, *grads = batch_norm_function.gradients(ctx, wanted, grad_output, y, *kept)
        of_input, of_weight = None, None
        if grad_y is not None:
            of_input, of_weight = conv_function.gradients(ctx, grad_y, input, weight)
        return of_input, of_weight, *grads, *(None,) * 11


def _wanted(ctx: Any) -> tuple[bool, bool, bool, bool]:
    """Whether there is to be a gradient of the convolution, scale, shift and residual."""
    of_input, of_weight, of_scale, of_shift, of_residual, *_ = ctx.needs_input_grad
    return of_input or of_weight, of_scale, of_shift, of_residual
