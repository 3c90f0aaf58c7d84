"""Launches convolution as an implicit matrix product: pixels x channels x (taps and channels)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tritorch import launch
from tritorch.ops.geometry import Geometry, is_wide, oriented, pixel_blocks
from tritorch.ops.reduce import accumulator_dtype, split_sum

kernels = launch.kernels("conv")
reduce_kernels = launch.kernels("reduce")

# slices of the inner axis, and tiles of pixels, that one program must have before it pays to split a sum
_MIN_STEPS = 8
_MIN_PIXEL_TILES = 4


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, geometry: Geometry, transposed: bool
) -> None:
    """Writes the convolution of x, or the transposed one, into y."""
    groups = geometry.groups
    if weight.stride(1) != 1 and weight.shape[1] >= 16:
        # channels along memory: a copy of the small operand, where every tile would gather weights one by one
        weight = weight.contiguous(memory_format=torch.channels_last)
    read, written, taps, strides = oriented(weight, groups, transposed)
    n, _, p, q = y.shape
    # transposed, every residue modulo the stride is an image of its own, and sees some of the taps
    classes, class_taps = 1, math.prod(taps)
    if transposed:
        tap_steps = geometry.residues(transposed)[:2]
        classes = math.prod(geometry.stride)
        p, q = (math.ceil(size / s) for size, s in zip((p, q), geometry.stride, strict=True))
        class_taps = math.prod(
            math.ceil(count / step) for count, step in zip(taps, tap_steps, strict=True)
        )
    pixels = n * p * q
    config = launch.config(
        kernels.conv2d_config, pixels, written, read, groups * classes, x.element_size()
    )
    block_npq, block_k, block_crs = (config.kwargs[f"BLOCK_{axes}"] for axes in ("NPQ", "K", "CRS"))
    flat = read < block_crs
    steps = (
        math.ceil(read * class_taps / block_crs)
        if flat
        else math.ceil(read / block_crs) * class_taps
    )
    tiles = math.ceil(pixels / block_npq) * math.ceil(written / block_k) * classes
    splits = reduce_kernels.num_splits(tiles * groups, steps, _MIN_STEPS)
    steps_per_split = math.ceil(steps / splits)
    splits = math.ceil(steps / steps_per_split)
    target = y
    if splits > 1:
        target = torch.empty_strided(
            (splits, *y.shape), (y.numel(), *y.stride()), dtype=accumulator_dtype(y.dtype), device=y.device
        )
    launch.run(
        kernels.conv2d_kernel,
        (tiles, groups * splits),
        x,
        weight,
        bias,
        target,
        n,
        read,
        *x.shape[2:],
        written,
        *taps,
        *y.shape[2:],
        steps_per_split,
        splits,
        bias.stride(0) if bias is not None else 1,
        *x.stride(),
        *strides,
        y.numel(),
        *y.stride(),
        *geometry.scalars(),
        *geometry.residues(transposed),
        on=y,
        config=config,
        TRANSPOSED=transposed,
        FLAT=flat,
        X_CHANNELS_LAST=x.stride(1) == 1,
        Y_CHANNELS_LAST=y.stride(1) == 1,
        HAS_BIAS=bias is not None,
        INPUT_PRECISION=launch.input_precision(x.dtype, "conv"),
        INDEX_64=is_wide(x, weight, y),
    )
    if splits > 1:
        split_sum(target, y)


def grad_weight(
    grad_output: Tensor, input: Tensor, output: Tensor, geometry: Geometry
) -> Tensor | None:
    """Partial gradients (splits, K, R, S, C) to be added in order; None if one split wrote the gradient itself."""
    outputs, inputs, *taps = output.shape
    groups = geometry.groups
    n, _, p, q = grad_output.shape
    products = inputs * math.prod(taps)
    config = launch.config(
        kernels.conv2d_grad_weight_config, outputs // groups, products, input.element_size()
    )
    block_k, block_crs, block_npq = (config.kwargs[f"BLOCK_{axes}"] for axes in ("K", "CRS", "NPQ"))
    channels_last = input.stride(1) == 1
    block_p, block_q, steps = pixel_blocks(n, p, q, block_npq, channels_last)
    tiles = math.ceil(outputs // groups / block_k) * math.ceil(products / block_crs)
    splits = reduce_kernels.num_splits(tiles * groups, steps, _MIN_PIXEL_TILES)
    steps_per_split = math.ceil(steps / splits)
    splits = math.ceil(steps / steps_per_split) if steps else 1
    target = output[None]
    if splits > 1:
        partial = input.new_empty((splits, outputs, *taps, inputs), dtype=accumulator_dtype(input.dtype))
        target = partial.permute(0, 1, 4, 2, 3)
    launch.run(
        kernels.conv2d_grad_weight_kernel,
        (tiles, groups * splits),
        grad_output,
        input,
        target,
        inputs,
        *input.shape[2:],
        outputs // groups,
        *taps,
        n,
        p,
        q,
        block_p,
        block_q,
        steps_per_split,
        splits,
        *grad_output.stride(),
        *input.stride(),
        *target.stride(),
        *geometry.scalars(),
        on=input,
        config=config,
        Y_CHANNELS_LAST=grad_output.stride(1) == 1,
        X_CHANNELS_LAST=channels_last,
        INPUT_PRECISION=launch.input_precision(input.dtype, "conv"),
        INDEX_64=is_wide(grad_output, input, target),
    )
    return partial if splits > 1 else None
