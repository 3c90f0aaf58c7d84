"""Launches depthwise convolutions, where `conv_dispatch` and `conv_weight` find that they fit."""

from __future__ import annotations

import math

from torch import Tensor

from tritorch import launch
from tritorch.ops.geometry import (
    Geometry,
    check_sizes,
    is_wide,
    oriented,
    pixel_blocks,
    split,
    strides,
    vector_unit,
)
from tritorch.ops.reduce import accumulator_dtype
from tritorch.ops.strided import Layout, are_alike

kernels = launch.kernels("depthwise")

# a channel with more outputs is better read once for all of them, by a matrix product
_MAX_MULTIPLIER = 8
# tiles of pixels that one program must have before it pays to split a sum
_MIN_TILES = 4


def takes(weight: Tensor, groups: int) -> bool:
    """Whether every output channel sees one input channel of an image, and few see the same."""
    return (
        weight.dim() == 4 and weight.shape[1] == 1 and weight.shape[0] // groups <= _MAX_MULTIPLIER
    )


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    geometry: Geometry,
    transposed: bool,
    activation: str | None = None,
    preactivation: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """Writes activation(convolution of x, or the transposed one, + bias + residual) into y; and
    what the activation is applied to into `preactivation`, which has the strides of y.
    """
    channels_last = y.stride(1) == 1
    if channels_last and weight.stride(0) != 1:
        # channels along memory, as in x and y: one small copy, where every tap would gather weights
        weight = weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    stride = None if bias is None else bias.stride(0)
    layouts = map(Layout.of, (x, weight, y))
    added = None if residual is None else Layout.of(residual)
    given = geometry, transposed, stride, activation, preactivation is not None, added
    run = _plan_convolve(*layouts, *given)
    run(y, x, weight, bias, y, preactivation, residual)


@launch.planned
def _plan_convolve(
    x: Layout,
    weight: Layout,
    y: Layout,
    geometry: Geometry,
    transposed: bool,
    bias_stride: int | None,
    activation: str | None,
    keeps_preactivation: bool,
    residual: Layout | None,
) -> launch.Prepared:
    check_sizes(weight, x, y)
    channels_last = y.stride(1) == 1
    w = oriented(weight, geometry.groups, transposed)
    n, channels, p, q = y.shape
    # transposed, every residue modulo the stride is an image of its own
    stride_h, stride_w = geometry.stride if transposed else (1, 1)
    # several outputs for an input, or inputs for an output, are no vector
    single = w.read == w.written == 1
    unit = vector_unit(x, y, channels, *w.strides[3:]) if single else 1
    if unit > 1:
        config = launch.config(kernels.depthwise_conv2d_config, channels, x.itemsize)
    else:
        config = launch.config(kernels.depthwise_conv2d_gather_config, channels_last)
    rows, columns = math.ceil(p / stride_h), math.ceil(q / stride_w)
    tap_steps, inverses = geometry.residues(transposed)
    block_npq, block_k = config.kwargs["BLOCK_NPQ"], config.kwargs["BLOCK_K"]
    block_p, block_q, tiles = pixel_blocks(n, rows, columns, block_npq, channels_last)
    numbers = (
        *(n, w.read, *x.shape[2:], geometry.groups // unit, w.written, *w.taps),
        *(p, q, block_p, block_q, 1 if bias_stride is None else bias_stride),
        *strides(x, unit),
        *(*w.strides[:3], *(s // unit for s in w.strides[3:])),
        *strides(y, unit),
        *(*geometry.scalars(), *tap_steps, *inverses),
        None if residual is None or are_alike(residual, y) else strides(residual),
    )
    return launch.Prepared(
        kernels.depthwise_conv2d_kernel,
        (tiles * stride_h * stride_w * math.ceil(channels / block_k),),
        numbers,
        config,
        TRANSPOSED=transposed,
        UNIT=unit,
        CHANNELS_LAST=channels_last,
        HAS_BIAS=bias_stride is not None,
        ACTIVATION=activation,
        KEEPS_PREACTIVATION=keeps_preactivation,
        INDEX_64=is_wide(x, weight, y, residual or y),
    )


def grad_weight(grad_output: Tensor, input: Tensor, output: Tensor, geometry: Geometry) -> Tensor:
    """Partial sums (splits, K, R, S, 1) of `output`, the gradient of the weight."""
    outputs, _, *taps = output.shape
    splits, run = _plan_grad_weight(*map(Layout.of, (grad_output, input, output)), geometry)
    shape, dtype = (splits, outputs, *taps, 1), accumulator_dtype(input.dtype)
    partial = input.new_empty(shape, dtype=dtype)
    run(input, grad_output, input, partial)
    return partial


@launch.planned
def _plan_grad_weight(
    y: Layout, x: Layout, weight: Layout, geometry: Geometry
) -> tuple[int, launch.Prepared]:
    """Partial sums, and the launch that writes them."""
    check_sizes(weight, x, y)
    outputs, _, *taps = weight.shape
    n, _, p, q = y.shape
    channels_last = y.stride(1) == 1
    multiplier = outputs // geometry.groups
    unit = vector_unit(x, y, outputs) if multiplier == 1 else 1
    if unit > 1:
        config = launch.config(kernels.depthwise_conv2d_grad_weight_config, x.itemsize)
    else:
        config = launch.config(kernels.depthwise_conv2d_grad_weight_gather_config, channels_last)
    block_rs, block_npq, block_k = (config.kwargs[f"BLOCK_{axes}"] for axes in ("RS", "NPQ", "K"))
    block_p, block_q, pixel_tiles = pixel_blocks(n, p, q, block_npq, channels_last)
    tiles = math.ceil(outputs / block_k) * math.ceil(math.prod(taps) / block_rs)
    splits, steps = split(tiles, pixel_tiles, _MIN_TILES)
    numbers = (
        *(*x.shape[2:], geometry.groups // unit, multiplier, *taps),
        *(n, p, q, block_p, block_q, steps),
        *(*strides(y, unit), *strides(x, unit), *geometry.scalars()),
    )
    return splits, launch.Prepared(
        kernels.depthwise_conv2d_grad_weight_kernel,
        (tiles, splits),
        numbers,
        config,
        UNIT=unit,
        CHANNELS_LAST=channels_last,
        INDEX_64=is_wide(x, y) or splits * outputs * math.prod(taps) >= 2**31,
    )
