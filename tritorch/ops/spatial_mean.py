"""Means of whole images, which are a reduction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritorch import binding, launch
from tritorch.ops import geometry, strided, windows
from tritorch.ops.geometry import is_channels_last
from tritorch.ops.reduce import accumulator_dtype, split_sum
from tritorch.ops.strided import Layout

kernels = launch.kernels("adaptive_pool")


def _means(input: Tensor) -> Tensor:
    shape = (*input.shape[:2], *(1 for _ in input.shape[2:]))
    return windows.empty(input, shape, is_channels_last(input), input.dtype)


@binding.library_op("spatial_mean(Tensor input) -> Tensor", fake=_means)
def _spatial_mean(input: Tensor) -> Tensor:
    output = _means(input)
    splits, run = _plan(Layout.of(input), input.is_contiguous())
    partial = output
    if splits > 1:
        partial = input.new_empty((splits, output.numel()), dtype=accumulator_dtype(input.dtype))
    run(input, input, partial)
    if splits > 1:
        split_sum(partial, output)
    return output


@launch.planned
def _plan(input: Layout, contiguous: bool) -> tuple[int, launch.Prepared]:
    """In how many sums of each image, and their launch."""
    (n, c, *size), pixels = input.shape, math.prod(input.shape[2:])
    if pixels <= kernels.MAX_SMALL and contiguous:
        return 1, _plan_small(n * c, pixels)
    channels_last = input.stride(1) == 1
    if input.stride(0) == c * input.stride(1):
        # the images are one of more channels, which is read in larger tiles
        n, c = 1, n * c
    nest = strided.nest_of("adaptive_avg_pool", tuple(size), input.strides[2:])
    sizes = channels_last, pixels, c, n, input.itemsize
    config = launch.config(kernels.spatial_mean_config, *sizes)
    programs = n * math.ceil(c / config.kwargs["BLOCK_C"])
    steps = math.ceil(pixels / config.kwargs["BLOCK_R"])
    splits, steps = geometry.split(programs, steps, 4)
    strides = (*input.strides[:2], *nest.strides[0][:3])
    return splits, launch.Prepared(
        kernels.spatial_mean_kernel,
        (programs, splits),
        (n, c, pixels, steps, *nest.sizes[1:3], *strides),
        config,
        INDEX_64=nest.wide or geometry.is_wide(input),
    )


def _plan_small(images: int, pixels: int) -> launch.Prepared:
    return launch.Prepared(
        kernels.small_mean_kernel,
        (math.ceil(images / kernels.SMALL_IMAGES),),
        (images, pixels),
        # the next power of two
        BLOCK_R=1 << (pixels - 1).bit_length(),
        BLOCK_C=kernels.SMALL_IMAGES,
    )


class SpatialMean(torch.autograd.Function):
    """The mean of every image."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.shape, ctx.channels_last = input.shape, is_channels_last(input)
        output: Tensor = _spatial_mean(input)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        grad_input: Tensor = binding.apply(
            SpatialMeanBackward, grad_output, ctx.shape, ctx.channels_last
        )
        return grad_input


def _spread(grad_output: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    return windows.empty(grad_output, shape, channels_last, grad_output.dtype)


@binding.library_op(
    "spatial_mean_backward(Tensor grad_output, SymInt[] shape, bool channels_last) -> Tensor",
    fake=_spread,
)
def _spatial_mean_backward(
    grad_output: Tensor, shape: Sequence[int], channels_last: bool
) -> Tensor:
    grad_input = _spread(grad_output, shape, channels_last)
    # as small as the means; a gradient of a sum is one number seen many times
    flat = grad_output.reshape(-1).contiguous()
    _plan_spread(tuple(shape), channels_last)(flat, flat, grad_input)
    return grad_input


@launch.planned
def _plan_spread(shape: tuple[int, ...], channels_last: bool) -> launch.Prepared:
    (n, c), pixels, numel = shape[:2], math.prod(shape[2:]), math.prod(shape)
    tile = kernels.SPREAD_R, kernels.SPREAD_C
    programs = n * math.ceil(pixels / tile[0]) * math.ceil(c / tile[1])
    if not channels_last:
        tile = kernels.SPREAD_ROW, 1
        programs = math.ceil(numel / tile[0])
    return launch.Prepared(
        kernels.spread_mean_kernel,
        (programs,),
        (numel, c, pixels),
        CHANNELS_LAST=channels_last,
        INDEX_64=numel > geometry.MAX_INDEX,
        BLOCK_R=tile[0],
        BLOCK_C=tile[1],
    )


class SpatialMeanBackward(torch.autograd.Function):
    """The transpose of `SpatialMean`: dense, for hooks write into gradients."""

    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
        grad_input: Tensor = _spatial_mean_backward(grad_output, shape, channels_last)
        return grad_input

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return binding.apply(SpatialMean, grad), None, None
