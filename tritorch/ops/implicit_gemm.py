"""Launches convolution as an implicit matrix product: pixels x channels x (taps and channels)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritorch import launch
from tritorch.ops import conv_tma, pointwise, stem
from tritorch.ops.activation_function import computes
from tritorch.ops.geometry import (
    Geometry,
    is_wide,
    memory_format,
    oriented,
    pixel_blocks,
    planar,
    split,
    strides,
    vector_unit,
)
from tritorch.ops.reduce import accumulator_dtype, split_sum
from tritorch.ops.strided import Layout

kernels = launch.kernels("conv")
weight_kernels = launch.kernels("conv_weight")

# what one program must have before it pays to split a sum: slices of channels, tiles of pixels
_MIN_SLICES = 8
_MIN_TILES = 4


class _Plan(NamedTuple):
    """A launch for tensors of known layouts."""

    grid: tuple[int, int]
    # the kernel's integers up to the stride of the bias, those after it, and those of a volume
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    depth: tuple[int, ...] | None
    splits: int
    config: Any
    constants: dict[str, Any]


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    geometry: Geometry,
    transposed: bool,
    activation: str | None = None,
    before: Tensor | None = None,
) -> None:
    """Writes the activation of the convolution of x, or of the transposed one, into y; and the
    values before it into `before`, which has the strides of y.
    """
    if pointwise.convolve(x, weight, bias, y, geometry, transposed, activation, before):
        return
    if weight.stride(1) != 1 and weight.shape[1] % 8 == 0:
        # channels along memory: one copy of the small operand, where every tile would gather it
        weight = weight.contiguous(memory_format=memory_format(True, weight.dim() - 2))
    if (tma := stem.plan_convolve(x, weight, y, geometry, transposed)) is not None:
        return stem.convolve(tma, x, weight, bias, y, geometry, activation, before)
    if (tma := conv_tma.plan_convolve(x, weight, y, geometry, transposed)) is not None:
        return conv_tma.convolve(tma, x, weight, bias, y, activation, before)
    precision = launch.input_precision(x.dtype, "conv")
    full = x.dtype == torch.float32 and precision == "ieee"
    layouts = map(Layout.of, (x, weight, y))
    plan = _plan_convolve(*layouts, geometry, transposed, full, computes(activation))
    target = y
    if plan.splits > 1:
        shape, order = (plan.splits, *y.shape), (y.numel(), *y.stride())
        dtype = accumulator_dtype(y.dtype)
        target = torch.empty_strided(shape, order, dtype=dtype, device=y.device)
    keeps_before = before is not None and plan.splits == 1
    launch.run(
        kernels.conv2d_kernel,
        plan.grid,
        x,
        weight,
        bias,
        target,
        before if keeps_before else None,
        *plan.sizes,
        bias.stride(0) if bias is not None else 1,
        *plan.strides,
        plan.depth,
        on=y,
        config=plan.config,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation if plan.splits == 1 else None,
        KEEPS_BEFORE=keeps_before,
        INPUT_PRECISION=precision,
        **plan.constants,
    )
    if plan.splits > 1:
        split_sum(target, y, activation=activation, before=before)


@launch.planned
def _plan_convolve(
    x: Layout,
    weight: Layout,
    y: Layout,
    geometry: Geometry,
    transposed: bool,
    full: bool,
    computes: bool,
) -> _Plan:
    groups = geometry.groups
    w = oriented(weight, groups, transposed)
    tap_steps, inverses = geometry.residues(transposed)
    # transposed, every residue modulo the stride is an image of its own: some taps reach it
    steps_each = geometry.stride if transposed else (1,) * len(geometry.stride)
    residues, num_taps = math.prod(steps_each), _ceil_product(w.taps[-2:], tap_steps[-2:])
    # the kernel takes one slice of taps after the other
    tap_slices = _ceil_product(w.taps[:-2], tap_steps[:-2])
    pixels = y.shape[0] * _ceil_product(y.shape[2:], steps_each)
    unit = vector_unit(x, y, w.read, w.written, *(s for s in w.strides if s != 1))
    volume = len(w.taps) == 3
    if unit > 1:
        tiles = groups * residues
        choose = kernels.conv2d_epilogue_config if computes else kernels.conv2d_config
        if full and computes:
            choose = kernels.conv2d_full_epilogue_config
        elif full:
            choose = kernels.conv3d_full_config if volume else kernels.conv2d_full_config
        config = launch.config(choose, pixels, w.written, tiles, x.itemsize)
    else:
        choose = kernels.conv3d_gather_config if volume else kernels.conv2d_gather_config
        config = launch.config(choose, pixels, w.written, x.itemsize)
    block_npq, block_k, block_crs = (config.kwargs[f"BLOCK_{axes}"] for axes in ("NPQ", "K", "CRS"))
    slices, flat = (
        math.ceil(w.read / block_crs) * num_taps,
        math.ceil(w.read * num_taps / block_crs),
    )
    # flat slices cost divisions, which an eighth fewer of them pay for
    is_flat = 8 * flat <= 7 * slices
    tiles = math.ceil(pixels / block_npq) * math.ceil(w.written / block_k) * residues
    # partial sums are as large as y, in float32: only a GPU that is mostly idle is worth them
    num_steps = (flat if is_flat else slices) * tap_slices
    splits, steps = split(2 * tiles * groups, num_steps, _MIN_SLICES)
    w_strides = tuple(s if s == 1 else s // unit for s in w.strides)
    return _Plan(
        (tiles, groups * splits),
        (
            y.shape[0],
            w.read // unit,
            *x.shape[-2:],
            w.written // unit,
            *w.taps[-2:],
            *y.shape[-2:],
            steps,
            splits,
        ),
        (
            *planar(strides(x, unit)),
            *(w_strides[:3] + w_strides[-2:]),
            math.prod(y.shape),
            *planar(strides(y, unit)),
            *geometry.scalars(),
            *tap_steps[-2:],
            *inverses[-2:],
        ),
        None
        if len(w.taps) == 2
        else (
            x.shape[2],
            w.taps[0],
            y.shape[2],
            strides(x, unit)[2],
            w_strides[3],
            strides(y, unit)[2],
            geometry.stride[0],
            geometry.padding[0],
            geometry.dilation[0],
            tap_steps[0],
            inverses[0],
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


def _ceil_product(sizes: Sequence[int], steps: Sequence[int]) -> int:
    return math.prod(math.ceil(n / step) for n, step in zip(sizes, steps, strict=True))


def grad_weight(
    grad_output: Tensor, input: Tensor, output: Tensor, geometry: Geometry
) -> Tensor | None:
    """Partial sums (splits, K, taps, C) of `output`, or None if it has been written itself."""
    if pointwise.grad_weight(grad_output, input, output, geometry):
        return None
    if (tma := stem.plan_grad_weight(grad_output, input, output, geometry)) is not None:
        stem.grad_weight(tma, grad_output, input, output, geometry)
        return None
    if (tma := conv_tma.plan_grad_weight(grad_output, input, output, geometry)) is not None:
        return conv_tma.grad_weight(tma, grad_output, input, output)
    plan = _plan_grad_weight(*map(Layout.of, (grad_output, input, output)), geometry)
    partial, target = None, output[None]
    if plan.splits > 1:
        outputs, inputs, *taps = output.shape
        shape, dtype = (plan.splits, outputs, *taps, inputs), accumulator_dtype(input.dtype)
        partial = input.new_empty(shape, dtype=dtype)
        target = partial.movedim(-1, 2)
    launch.run(
        weight_kernels.conv2d_grad_weight_kernel,
        plan.grid,
        grad_output,
        input,
        target,
        *plan.sizes,
        *plan.strides[:8],
        *(target.stride()[:3] + target.stride()[-2:]),
        *plan.strides[8:],
        plan.depth and (*plan.depth[:5], target.stride(3), *plan.depth[5:]),
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
    k, crs = outputs // groups, inputs * math.prod(taps[-2:])
    n, _, *slices, p, q = grad_output.shape
    unit = vector_unit(input, grad_output, inputs, k)
    if unit == 1:
        choose = weight_kernels.conv2d_grad_weight_gather_config
    elif slices:
        choose = weight_kernels.conv3d_grad_weight_config
    else:
        choose = weight_kernels.conv2d_grad_weight_config
    config = launch.config(choose, k, crs, input.itemsize)
    block_k, block_crs, block_npq = (config.kwargs[f"BLOCK_{axes}"] for axes in ("K", "CRS", "NPQ"))
    block_p, block_q, pixel_tiles = pixel_blocks(n, p, q, block_npq, input.stride(1) == 1)
    # a program of a volume has one slice of taps
    tiles = math.ceil(k / block_k) * math.ceil(crs / block_crs) * math.prod(taps[:-2])
    splits, steps = split(tiles * groups, pixel_tiles * math.prod(slices), _MIN_TILES)
    # the partial sums are dense, and as many as the splits
    target = math.prod(output.shape) * splits if splits > 1 else 0
    return _Plan(
        (tiles, groups * splits),
        (
            inputs // unit,
            *input.shape[-2:],
            k // unit,
            *taps[-2:],
            n,
            p,
            q,
            block_p,
            block_q,
            steps,
            splits,
        ),
        (
            *planar(strides(grad_output, unit)),
            *planar(strides(input, unit)),
            *geometry.scalars(),
        ),
        None
        if len(taps) == 2
        else (
            input.shape[2],
            taps[0],
            *slices,
            strides(grad_output, unit)[2],
            strides(input, unit)[2],
            geometry.stride[0],
            geometry.padding[0],
            geometry.dilation[0],
        ),
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
