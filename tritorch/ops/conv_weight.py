"""Chooses the kernel for the gradient of a filter, launches the portable one, adds partial sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from tritorch import launch
from tritorch.ops import conv_tma, conv_weight_tma, depthwise, matmul_tma, pointwise, reorder, stem
from tritorch.ops.geometry import (
    Geometry,
    are_vectors,
    check_sizes,
    is_wide,
    pixel_blocks,
    planar,
    split,
    strides,
    vector_unit,
)
from tritorch.ops.reduce import accumulator_dtype, many_splits_sum
from tritorch.ops.strided import Layout

kernels = launch.kernels("conv_weight")

# tiles of pixels that one program must have before it pays to split a sum
_MIN_TILES = 4


def grad_weight(grad_output: Tensor, input: Tensor, output: Tensor, geometry: Geometry) -> None:
    """Writes the gradient of the filter into `output`: input and grad_output, correlated over all
    pixels.
    """
    partial_sums: Tensor | None
    if depthwise.takes(output, geometry.groups):
        partial_sums = depthwise.grad_weight(grad_output, input, output, geometry)
    else:
        few = output.shape[1] <= stem.MAX_CHANNELS
        # few channels are packed first, from any strides
        aligned = (grad_output,) if few else (grad_output, input, output)
        run = _choose(
            Layout.of(grad_output),
            Layout.of(input),
            Layout.of(output),
            geometry,
            # the sum runs over pixels, which are not contiguous: not for TF32
            matmul_tma.processors("ieee", *aligned),
            launch.input_precision(input.dtype, "conv"),
        )
        partial_sums = run(grad_output, input, output)
    if partial_sums is not None:
        # with the channels last, as in the partial sums
        many_splits_sum(partial_sums, output.movedim(1, -1), kernels.SPLITS_AT_ONCE)


@launch.planned
def _choose(
    grad_output: Layout,
    input: Layout,
    output: Layout,
    geometry: Geometry,
    count: int,
    precision: str,
) -> Callable[..., Tensor | None]:
    """The first kernel that takes tensors of these layouts: a function of the three tensors that
    returns partial sums (splits, K, taps, C) of `output`, or None if it has written that itself.
    """
    check_sizes(output, grad_output, input)
    products = math.prod(grad_output.shape) * math.prod(output.shape[1:])
    given = products, precision, grad_output, input
    least = reorder.MIN_OF_FILTERS if precision == "tf32" else reorder.MIN_PRODUCTS
    if are_vectors(output, geometry) and reorder.pays(*given, least=least):
        images = reorder.channels_last(grad_output), reorder.channels_last(input)
        run = _choose(*images, output, geometry, count, precision)
        return partial(reorder.grad_weight, run)
    hopper: matmul_tma.Plan | conv_tma.Plan | None
    if count and output.shape[1] <= stem.MAX_CHANNELS:
        grads = grad_output
        if reorder.pays(products, precision, grad_output):
            grads = reorder.channels_last(grad_output)
        hopper = stem.plan_grad_weight(grads, input, output, geometry)
        if hopper is not None:
            run = partial(stem.grad_weight, hopper, geometry)
            return run if grads is grad_output else partial(reorder.of_grads, run)
    elif count:
        hopper = pointwise.plan_grad_weight(grad_output, input, output, geometry, count)
        if hopper is not None:
            return partial(matmul_tma.run, hopper)
        hopper = conv_weight_tma.plan(grad_output, input, output, geometry)
        if hopper is not None:
            return partial(conv_weight_tma.grad_weight, hopper)
    plan = _plan_portable(grad_output, input, output, geometry, precision)
    return partial(_run_portable, plan)


class _Portable(NamedTuple):
    """A launch of `conv2d_grad_weight_kernel`; with `splits` above 1 partial sums are left."""

    splits: int
    run: launch.Prepared


def _run_portable(
    plan: _Portable, grad_output: Tensor, input: Tensor, output: Tensor
) -> Tensor | None:
    if plan.splits == 1:
        plan.run(input, grad_output, input, output)
        return None
    outputs, inputs, *taps = output.shape
    shape, dtype = (plan.splits, outputs, *taps, inputs), accumulator_dtype(input.dtype)
    sums = input.new_empty(shape, dtype=dtype)
    plan.run(input, grad_output, input, sums)
    return sums


def _plan_portable(
    grad_output: Layout, input: Layout, output: Layout, geometry: Geometry, precision: str
) -> _Portable:
    outputs, inputs, *taps = output.shape
    groups = geometry.groups
    k, crs = outputs // groups, inputs * math.prod(taps[-2:])
    n, _, *slices, p, q = grad_output.shape
    unit = vector_unit(input, grad_output, inputs, k)
    if unit == 1:
        choose = kernels.conv2d_grad_weight_gather_config
    elif slices:
        choose = kernels.conv3d_grad_weight_config
    else:
        choose = kernels.conv2d_grad_weight_config
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
        kernels.conv2d_grad_weight_kernel,
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
    return _Portable(splits, prepared)
