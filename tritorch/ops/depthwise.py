"""Launches the convolution kernels for few channels per group; `conv` chooses between these and matrix products."""

from __future__ import annotations

import math

from torch import Tensor

from tritorch import launch
from tritorch.ops.geometry import Geometry, is_wide, oriented, pixel_blocks
from tritorch.ops.reduce import accumulator_dtype

kernels = launch.kernels("depthwise")
reduce_kernels = launch.kernels("reduce")

# products of two channels of a group below which a tile of tensor-core size would be mostly empty
_MAX_PRODUCTS = 16
# tiles of pixels that one program must have before it pays to split the sum over more programs
_MIN_STEPS = 4


def takes(weight: Tensor, groups: int) -> bool:
    """Whether so few channels meet in a group that no matrix product is made of it, as in a depthwise convolution."""
    return weight.shape[1] * (weight.shape[0] // groups) <= _MAX_PRODUCTS


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, geometry: Geometry, transposed: bool
) -> None:
    """Writes the convolution of x, or the transposed one, into y."""
    channels_last = y.stride(1) == 1
    if channels_last and weight.stride(0) != 1:
        # channels along memory, as in x and y: a small copy, where each tap would gather a weight per channel
        weight = weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    read, written, taps, strides = oriented(weight, geometry.groups, transposed)
    n, channels, p, q = y.shape
    # transposed, every residue modulo the stride is an image of its own
    stride_h, stride_w = geometry.stride if transposed else (1, 1)
    config = launch.config(kernels.depthwise_conv2d_config, channels, channels_last)
    block_p, block_q, tiles = pixel_blocks(
        n,
        math.ceil(p / stride_h),
        math.ceil(q / stride_w),
        config.kwargs["BLOCK_NPQ"],
        channels_last,
    )
    tiles_k = math.ceil(channels / config.kwargs["BLOCK_K"])
    launch.run(
        kernels.depthwise_conv2d_kernel,
        (tiles * stride_h * stride_w * tiles_k,),
        x,
        weight,
        bias,
        y,
        n,
        read,
        *x.shape[2:],
        geometry.groups,
        written,
        *taps,
        p,
        q,
        block_p,
        block_q,
        bias.stride(0) if bias is not None else 1,
        *x.stride(),
        *strides,
        *y.stride(),
        *geometry.scalars(),
        *geometry.residues(transposed),
        on=y,
        config=config,
        TRANSPOSED=transposed,
        CHANNELS_LAST=channels_last,
        HAS_BIAS=bias is not None,
        INDEX_64=is_wide(x, weight, y),
    )


def grad_weight(
    grad_output: Tensor, input: Tensor, output: Tensor, geometry: Geometry
) -> Tensor:
    """Partial gradients (splits, K, R, S, C) of the weight that `output` is the gradient of, to be added in order."""
    outputs, inputs, *taps = output.shape
    n, _, p, q = grad_output.shape
    channels_last = grad_output.stride(1) == 1
    config = launch.config(kernels.depthwise_conv2d_grad_weight_config, channels_last)
    block_p, block_q, steps = pixel_blocks(n, p, q, config.kwargs["BLOCK_NPQ"], channels_last)
    products = inputs * math.prod(taps)
    tiles = math.ceil(outputs / config.kwargs["BLOCK_K"]) * math.ceil(
        products / config.kwargs["BLOCK_CRS"]
    )
    steps_per_split = math.ceil(steps / reduce_kernels.num_splits(tiles, steps, _MIN_STEPS))
    splits = max(1, math.ceil(steps / max(steps_per_split, 1)))
    partial = input.new_empty((splits, outputs, *taps, inputs), dtype=accumulator_dtype(input.dtype))
    launch.run(
        kernels.depthwise_conv2d_grad_weight_kernel,
        (tiles, splits),
        grad_output,
        input,
        partial,
        inputs,
        *input.shape[2:],
        geometry.groups,
        outputs // geometry.groups,
        *taps,
        n,
        p,
        q,
        block_p,
        block_q,
        steps_per_split,
        *grad_output.stride(),
        *input.stride(),
        *geometry.scalars(),
        on=input,
        config=config,
        CHANNELS_LAST=channels_last,
        INDEX_64=is_wide(grad_output, input, partial),
    )
    return partial
