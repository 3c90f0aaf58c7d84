"""Launches convolution as an implicit matrix product: pixels x channels x (taps and channels)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritorch import launch
from tritorch.ops.geometry import (
    Geometry,
    is_wide,
    oriented,
    pixel_blocks,
    split,
    strides,
    vector_unit,
)
from tritorch.ops.reduce import accumulator_dtype, split_sum
from tritorch.ops.strided import Layout

kernels = launch.kernels("conv")

# what one program must have before it pays to split a sum: slices of channels, tiles of pixels
_MIN_SLICES = 8
_MIN_TILES = 4


class _Plan(NamedTuple):
    """A launch for tensors of known layouts."""

    grid: tuple[int, int]
    # the kernel's integers up to the stride of the bias, and those after it
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    splits: int
    config: Any
    constants: dict[str, Any]


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, geometry: Geometry, transposed: bool
) -> None:
    """Writes the convolution of x, or the transposed one, into y."""
    if weight.stride(1) != 1 and weight.shape[1] % 8 == 0:
        # channels along memory: one copy of the small operand, where every tile would gather it
        weight = weight.contiguous(memory_format=torch.channels_last)
    precision = launch.input_precision(x.dtype, "conv")
    full = x.dtype == torch.float32 and precision == "ieee"
    plan = _plan_convolve(*map(Layout.of, (x, weight, y)), geometry, transposed, full)
    target = y
    if plan.splits > 1:
        shape, order = (plan.splits, *y.shape), (y.numel(), *y.stride())
        dtype = accumulator_dtype(y.dtype)
        target = torch.empty_strided(shape, order, dtype=dtype, device=y.device)
    launch.run(
        kernels.conv2d_kernel,
        plan.grid,
        x,
        weight,
        bias,
        target,
        *plan.sizes,
        bias.stride(0) if bias is not None else 1,
        *plan.strides,
        on=y,
        config=plan.config,
        HAS_BIAS=bias is not None,
        INPUT_PRECISION=precision,
        **plan.constants,
    )
    if plan.splits > 1:
        split_sum(target, y)


@launch.planned
def _plan_convolve(
    x: Layout, weight: Layout, y: Layout, geometry: Geometry, transposed: bool, full: bool
) -> _Plan:
    groups = geometry.groups
    w = oriented(weight, groups, transposed)
    n, _, p, q = y.shape
    residues, num_taps = 1, math.prod(w.taps)
    if transposed:
        # every residue modulo the stride is an image of its own, reached by some of the taps
        residues = math.prod(geometry.stride)
        p, q = math.ceil(p / geometry.stride[0]), math.ceil(q / geometry.stride[1])
        step_h, step_w = geometry.residues(transposed)[:2]
        num_taps = math.ceil(w.taps[0] / step_h) * math.ceil(w.taps[1] / step_w)
    pixels = n * p * q
    unit = vector_unit(x, y, w.read, w.written, *(s for s in w.strides if s != 1))
    if unit > 1:
        tiles = groups * residues
        choose = kernels.conv2d_full_config if full else kernels.conv2d_config
        config = launch.config(choose, pixels, w.written, tiles, x.itemsize)
    else:
        config = launch.config(kernels.conv2d_gather_config, pixels, w.written, x.itemsize)
    block_npq, block_k, block_crs = (config.kwargs[f"BLOCK_{axes}"] for axes in ("NPQ", "K", "CRS"))
    slices, flat = (
        math.ceil(w.read / block_crs) * num_taps,
        math.ceil(w.read * num_taps / block_crs),
    )
    # flat slices cost divisions, which an eighth fewer of them pay for
    is_flat = 8 * flat <= 7 * slices
    tiles = math.ceil(pixels / block_npq) * math.ceil(w.written / block_k) * residues
    # partial sums are as large as y, in float32: only a GPU that is mostly idle is worth them
    splits, steps = split(2 * tiles * groups, flat if is_flat else slices, _MIN_SLICES)
    return _Plan(
        (tiles, groups * splits),
        (
            n,
            w.read // unit,
            *x.shape[2:],
            w.written // unit,
            *w.taps,
            *y.shape[2:],
            steps,
            splits,
        ),
        (
            *strides(x, unit),
            *(s if s == 1 else s // unit for s in w.strides),
            math.prod(y.shape),
            *strides(y, unit),
            *geometry.scalars(),
            *geometry.residues(transposed),
        ),
        splits,
        config,
        {
            "TRANSPOSED": transposed,
            "FLAT_C": w.read if is_flat else 0,
            "UNIT": unit,
            "X_CHANNELS_LAST": x.stride(1) == 1,
            "Y_CHANNELS_LAST": y.stride(1) == 1,
            "INDEX_64": is_wide(x, weight, y),
        },
    )


def grad_weight(
    grad_output: Tensor, input: Tensor, output: Tensor, geometry: Geometry
) -> Tensor | None:
    """Partial sums (splits, K, R, S, C) of `output`, or None if it has been written itself."""
    plan = _plan_grad_weight(*map(Layout.of, (grad_output, input, output)), geometry)
    partial, target = None, output[None]
    if plan.splits > 1:
        outputs, inputs, *taps = output.shape
        shape, dtype = (plan.splits, outputs, *taps, inputs), accumulator_dtype(input.dtype)
        partial = input.new_empty(shape, dtype=dtype)
        target = partial.permute(0, 1, 4, 2, 3)
    launch.run(
        kernels.conv2d_grad_weight_kernel,
        plan.grid,
        grad_output,
        input,
        target,
        *plan.sizes,
        *plan.strides[:8],
        *target.stride(),
        *plan.strides[8:],
        on=input,
        config=plan.config,
        INPUT_PRECISION=launch.input_precision(input.dtype, "conv"),
        **plan.constants,
    )
    return partial


@launch.planned
def _plan_grad_weight(
    grad_output: Layout, input: Layout, output: Layout, geometry: Geometry
) -> _Plan:
    outputs, inputs, *taps = output.shape
    groups = geometry.groups
    k, crs = outputs // groups, inputs * math.prod(taps)
    n, _, p, q = grad_output.shape
    unit = vector_unit(input, grad_output, inputs, k)
    config = launch.config(
        kernels.conv2d_grad_weight_config if unit > 1 else kernels.conv2d_grad_weight_gather_config,
        k,
        crs,
        input.itemsize,
    )
    block_k, block_crs, block_npq = (config.kwargs[f"BLOCK_{axes}"] for axes in ("K", "CRS", "NPQ"))
    block_p, block_q, pixel_tiles = pixel_blocks(n, p, q, block_npq, input.stride(1) == 1)
    tiles = math.ceil(k / block_k) * math.ceil(crs / block_crs)
    splits, steps = split(tiles * groups, pixel_tiles, _MIN_TILES)
    # the partial sums are dense, and as many as the splits
    target = math.prod(output.shape) * splits if splits > 1 else 0
    return _Plan(
        (tiles, groups * splits),
        (
            inputs // unit,
            *input.shape[2:],
            k // unit,
            *taps,
            n,
            p,
            q,
            block_p,
            block_q,
            steps,
            splits,
        ),
        (*strides(grad_output, unit), *strides(input, unit), *geometry.scalars()),
        splits,
        config,
        {
            # few channels are a constant, whose divisions do not hide aligned vectors
            "FLAT_C": inputs if inputs < 64 else 0,
            "UNIT": unit,
            "Y_CHANNELS_LAST": grad_output.stride(1) == 1,
            "X_CHANNELS_LAST": input.stride(1) == 1,
            "INDEX_64": is_wide(grad_output, input, output) or target >= 2**31,
        },
    )
