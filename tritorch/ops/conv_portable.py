"""Launches of convolution, and of the gradient of its filters, by the kernels for any GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tritorch import launch
from tritorch.ops.activation_function import computes
from tritorch.ops.geometry import (
    Geometry,
    is_wide,
    oriented,
    pixel_blocks,
    planar,
    split,
    strides,
    vector_unit,
)
from tritorch.ops.reduce import accumulator_dtype, split_sum
from tritorch.ops.strided import Layout, are_alike

kernels = launch.kernels("conv")
weight_kernels = launch.kernels("conv_weight")

# what one program must have before it pays to split a sum: slices of channels, tiles of pixels
_MIN_SLICES = 8
_MIN_TILES = 4


class Plan(NamedTuple):
    """A launch for tensors of known layouts; with `splits` above 1 partial sums are left to add."""

    splits: int
    run: launch.Prepared


class Epilogue(NamedTuple):
    """What is applied to a sum before it is stored."""

    # of the bias; None without one
    stride: int | None = None
    activation: str | None = None
    keeps_before: bool = False
    # whether channel moments are wanted, where a kernel can write them
    moments: bool = False
    residual: Layout | None = None


def convolve(
    plan: Plan,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    bias: Tensor | None,
    activation: str | None,
    before: Tensor | None,
    _: None,
    residual: Tensor | None,
) -> None:
    if plan.splits == 1:
        return plan.run(y, x, weight, bias, y, before, residual)
    shape, order = (plan.splits, *y.shape), (y.numel(), *y.stride())
    dtype = accumulator_dtype(y.dtype)
    sums = torch.empty_strided(shape, order, dtype=dtype, device=y.device)
    plan.run(y, x, weight, bias, sums, None, None)
    split_sum(sums, y, None, activation, before, residual)


def plan_convolve(
    x: Layout,
    weight: Layout,
    y: Layout,
    geometry: Geometry,
    transposed: bool,
    precision: str,
    epilogue: Epilogue,
) -> Plan:
    groups = geometry.groups
    w = oriented(weight, groups, transposed)
    tap_steps, inverses = geometry.residues(transposed)
    # transposed, every residue modulo the stride is an image of its own, reached by some taps
    steps_each = geometry.stride if transposed else (1,) * len(geometry.stride)
    residues, num_taps = math.prod(steps_each), _ceil_product(w.taps[-2:], tap_steps[-2:])
    # the kernel goes through slices of taps one after the other
    tap_slices = _ceil_product(w.taps[:-2], tap_steps[:-2])
    pixels = y.shape[0] * _ceil_product(y.shape[2:], steps_each)
    unit = vector_unit(x, y, w.read, w.written, *(s for s in w.strides if s != 1))
    volume, full = len(w.taps) == 3, x.itemsize == 4 and precision == "ieee"
    own, residual = None, epilogue.residual
    if residual is not None and not are_alike(residual, y):
        own = strides(residual)
    if unit > 1:
        tiles = groups * residues
        choose = kernels.conv2d_config
        # a residual that is not laid out as y has addresses of its own, which take registers
        if x.itemsize == 4 and (own or (full and computes(epilogue.activation))):
            choose = kernels.conv2d_full_epilogue_config
        elif full:
            choose = kernels.conv3d_full_config if volume else kernels.conv2d_full_config
        config = launch.config(choose, pixels, w.written, tiles, x.itemsize)
    else:
        config = launch.config(kernels.conv2d_gather_config, pixels, w.written, x.itemsize)
    block_npq, block_k, block_crs = (config.kwargs[f"BLOCK_{axes}"] for axes in ("NPQ", "K", "CRS"))
    slices, flat = (
        math.ceil(w.read / block_crs) * num_taps,
        math.ceil(w.read * num_taps / block_crs),
    )
    # flat slices cost divisions, which pay if there are an eighth fewer slices
    is_flat = 8 * flat <= 7 * slices
    tiles = math.ceil(pixels / block_npq) * math.ceil(w.written / block_k) * residues
    # partial sums are as large as y, in float32: they pay only on a GPU that is mostly idle
    num_steps = (flat if is_flat else slices) * tap_slices
    splits, steps = split(2 * tiles * groups, num_steps, _MIN_SLICES)
    w_strides = tuple(s if s == 1 else s // unit for s in w.strides)
    channels, images = (w.read // unit, w.written // unit), (*x.shape[-2:], *y.shape[-2:])
    depth = None
    if volume:
        depth = (
            *(x.shape[2], w.taps[0], y.shape[2]),
            *(strides(x, unit)[2], w_strides[3], strides(y, unit)[2]),
            *(geometry.stride[0], geometry.padding[0], geometry.dilation[0]),
            *(tap_steps[0], inverses[0]),
        )
    numbers = (
        *(y.shape[0], channels[0], *images[:2], channels[1], *w.taps[-2:], *images[2:]),
        *(steps, splits, 1 if epilogue.stride is None else epilogue.stride),
        *planar(strides(x, unit)),
        *(w_strides[:3] + w_strides[-2:]),
        *(math.prod(y.shape), *planar(strides(y, unit))),
        *(*geometry.scalars(), *tap_steps[-2:], *inverses[-2:]),
        *(depth, own if splits == 1 else None),
    )
    prepared = launch.Prepared(
        kernels.conv2d_kernel,
        (tiles, groups * splits),
        numbers,
        config,
        HAS_BIAS=epilogue.stride is not None,
        # with splits it is applied when the partial sums are added
        ACTIVATION=epilogue.activation if splits == 1 else None,
        KEEPS_BEFORE=epilogue.keeps_before and splits == 1,
        INPUT_PRECISION=precision,
        TRANSPOSED=transposed,
        FLAT_C=w.read if is_flat else 0,
        UNIT=unit,
        X_CHANNELS_LAST=x.stride(1) == 1,
        Y_CHANNELS_LAST=y.stride(1) == 1,
        INDEX_64=is_wide(x, weight, y, residual or y),
    )
    return Plan(splits, prepared)


def _ceil_product(sizes: Sequence[int], steps: Sequence[int]) -> int:
    return math.prod(math.ceil(n / step) for n, step in zip(sizes, steps, strict=True))


def grad_weight(plan: Plan, grad_output: Tensor, input: Tensor, output: Tensor) -> Tensor | None:
    if plan.splits == 1:
        plan.run(input, grad_output, input, output)
        return None
    outputs, inputs, *taps = output.shape
    shape, dtype = (plan.splits, outputs, *taps, inputs), accumulator_dtype(input.dtype)
    sums = input.new_empty(shape, dtype=dtype)
    plan.run(input, grad_output, input, sums)
    return sums


def plan_grad_weight(
    grad_output: Layout, input: Layout, output: Layout, geometry: Geometry, precision: str
) -> Plan:
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
    size = math.prod(output.shape)
    # strides of the result, or of the dense partial sums: splits, K, C and taps
    target = (size, *output.strides)
    if splits > 1:
        over_taps = [math.prod(taps[i + 1 :]) * inputs for i in range(len(taps))]
        target = (size, size // outputs, 1, *over_taps)
    depth = None
    if slices:
        depth = (
            *(input.shape[2], taps[0], *slices),
            *(strides(grad_output, unit)[2], strides(input, unit)[2], target[3]),
            *(geometry.stride[0], geometry.padding[0], geometry.dilation[0]),
        )
    numbers = (
        *(inputs // unit, *input.shape[-2:], k // unit, *taps[-2:]),
        *(n, p, q, block_p, block_q, steps, splits),
        *planar(strides(grad_output, unit)),
        *planar(strides(input, unit)),
        *(target[:3] + target[-2:]),
        *geometry.scalars(),
        depth,
    )
    prepared = launch.Prepared(
        weight_kernels.conv2d_grad_weight_kernel,
        (tiles, groups * splits),
        numbers,
        config,
        # few channels are a compile-time constant: divisions by it do not hide aligned vectors
        FLAT_C=inputs if inputs < 64 else 0,
        UNIT=unit,
        Y_CHANNELS_LAST=grad_output.stride(1) == 1,
        X_CHANNELS_LAST=input.stride(1) == 1,
        INDEX_64=is_wide(grad_output, input, output) or (splits > 1 and size * splits >= 2**31),
        INPUT_PRECISION=precision,
    )
    return Plan(splits, prepared)
