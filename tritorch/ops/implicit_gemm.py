"""Launches convolution as an implicit matrix product: pixels x channels x (taps and channels)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tritorch import launch
from tritorch.ops import conv_tma, matmul_tma, pointwise, reorder, stem
from tritorch.ops.activation_function import computes
from tritorch.ops.geometry import (
    Geometry,
    check_sizes,
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
from tritorch.ops.strided import Layout, are_alike, dense

kernels = launch.kernels("conv")
weight_kernels = launch.kernels("conv_weight")

# pixels from which a copy of the filters costs less than it saves, as estimated
_MIN_PIXELS = 16384
# what one program must have before it pays to split a sum: slices of channels, tiles of pixels
_MIN_SLICES = 8
_MIN_TILES = 4


class _Plan(NamedTuple):
    """A launch for tensors of known layouts; `splits`: sums that are left to add."""

    splits: int
    run: launch.Prepared


class _Epilogue(NamedTuple):
    """What becomes of a sum before it is stored."""

    # of the bias
    stride: int | None = None
    activation: str | None = None
    keeps_before: bool = False
    # whether those of the channels are wanted, where a kernel can write them
    moments: bool = False
    residual: Layout | None = None


class _Way(NamedTuple):
    """What convolves tensors of known layouts."""

    # x, weight, y, bias, activation, the values before it, moments, residual
    run: Callable[..., None]
    # parts of y of whose channels it can write the moments
    parts: int = 0


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    geometry: Geometry,
    transposed: bool,
    activation: str | None = None,
    before: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """Writes activation(convolution of x, or the transposed one, + bias + residual) into y; and the
    values before it into `before`, which has the strides of y.
    """
    if weight.stride(1) != 1:
        weight = _along_channels(weight)
    stride = None if bias is None else bias.stride(0)
    added = None if residual is None else Layout.of(residual)
    epilogue = _Epilogue(stride, activation, before is not None, False, added)
    way = _way_of(x, weight, y, geometry, transposed, epilogue, residual)
    way.run(x, weight, y, bias, activation, before, None, residual)


def convolve_with_moments(
    x: Tensor, weight: Tensor, y: Tensor, geometry: Geometry
) -> Tensor | None:
    """Writes the convolution of x into y and returns what its kernel tells of the values it
    stored: mean, squared deviations and count of each channel of each part of y, (parts, 3, K)
    float32; None where it does not.
    """
    if weight.stride(1) != 1:
        weight = _along_channels(weight)
    way = _way_of(x, weight, y, geometry, False, _Epilogue(moments=True))
    moments = None
    if way.parts:
        moments = y.new_empty((way.parts, 3, y.shape[1]), dtype=accumulator_dtype(y.dtype))
    way.run(x, weight, y, None, None, None, moments, None)
    return moments


def _along_channels(weight: Tensor) -> Tensor:
    if weight.shape[1] % 8:
        return weight
    # channels along memory: one copy of the small operand, where every tile would gather it
    return weight.contiguous(memory_format=memory_format(True, weight.dim() - 2))


def _way_of(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    geometry: Geometry,
    transposed: bool,
    epilogue: _Epilogue,
    residual: Tensor | None = None,
) -> _Way:
    precision = launch.input_precision(x.dtype, "conv")
    return _way(
        Layout.of(x),
        Layout.of(weight),
        Layout.of(y),
        geometry,
        transposed,
        epilogue,
        _processors(precision, x, weight, y, weight.shape[1], residual),
        precision,
    )


def _processors(
    precision: str,
    first: Tensor,
    second: Tensor,
    y: Tensor,
    channels: int,
    residual: Tensor | None = None,
) -> int:
    """Multiprocessors for the kernels of Hopper, 0 if the tensors are not for them."""
    written = (y,) if residual is None else (y, residual)
    if channels <= stem.MAX_CHANNELS:
        # what is packed first, 16-bit numbers alone, may lie anywhere
        return matmul_tma.processors("ieee", *written)
    return matmul_tma.processors(precision, first, second, *written)


@launch.planned
def _way(
    x: Layout,
    weight: Layout,
    y: Layout,
    geometry: Geometry,
    transposed: bool,
    epilogue: _Epilogue,
    count: int,
    precision: str,
) -> _Way:
    """The first kernel that takes tensors of these layouts."""
    check_sizes(weight, x, y)
    products = math.prod((x if transposed else y).shape) * math.prod(weight.shape[1:])
    residual = epilogue.residual
    written = (y,) if residual is None else (y, residual)
    if _are_vectors(weight, geometry) and reorder.pays(products, precision, x, *written):
        images = reorder.channels_last(x), reorder.channels_last(y)
        epilogue = _in_channels_last(epilogue)
        rest = geometry, transposed, epilogue, count, precision
        way = _way(images[0], weight, images[1], *rest)
        return way._replace(run=partial(reorder.convolve, way.run))
    # beside erf the tile of 64 filters has no registers for its sums
    crowded = epilogue.activation == "gelu" and y.shape[1] // geometry.groups <= 64
    if count and weight.shape[1] <= stem.MAX_CHANNELS:
        if not crowded and not transposed:
            # x is packed from any order
            copies = reorder.pays(products, precision, *written)
            into = reorder.channels_last(y) if copies else y
            added = _in_channels_last(epilogue).residual if copies else residual
            hopper = stem.plan_convolve(
                x, weight, into, geometry, count, added, epilogue.activation
            )
            if hopper is not None:
                run = partial(stem.convolve, hopper, geometry)
                return _Way(partial(reorder.results, run) if copies else run, hopper.parts)
    elif count:
        asked = y, geometry, transposed, epilogue, count, crowded
        found = _way_of_descriptors(x, weight, *asked)
        if found is None and _pays_to_turn(x, weight, transposed):
            found = _way_of_descriptors(x, _outputs_last(weight), *asked)
            if found is not None:
                found = found._replace(run=partial(_turned, found.run))
        if found is not None:
            return found
    plan = _plan_convolve(x, weight, y, geometry, transposed, precision, epilogue)
    return _Way(partial(_convolve, plan))


def _way_of_descriptors(
    x: Layout,
    weight: Layout,
    y: Layout,
    geometry: Geometry,
    transposed: bool,
    epilogue: _Epilogue,
    count: int,
    crowded: bool,
) -> _Way | None:
    """As a product of pixels, or of pixels of every tap; None if neither takes it."""
    has_bias, residual = epilogue.stride is not None, epilogue.residual
    given = x, weight, y, geometry, transposed
    product = pointwise.plan_convolve(*given, has_bias, count, epilogue.moments, residual)
    if product is not None:
        return _Way(partial(matmul_tma.run, product), product.parts)
    if crowded:
        return None
    asked = count, residual, epilogue.activation, has_bias
    taps = conv_tma.plan_convolve(*given, *asked)
    return None if taps is None else _Way(partial(conv_tma.convolve, taps), taps.parts)


def _pays_to_turn(x: Layout, weight: Layout, transposed: bool) -> bool:
    """Whether a copy of the filters with another axis along memory may let descriptors take them,
    and there are pixels enough to pay for it.
    """
    along = conv_tma.along_memory(weight, transposed)
    return along == 0 and math.prod(x.shape) >= _MIN_PIXELS * x.shape[1]


def _outputs_last(weight: Layout) -> Layout:
    outputs, *rest = weight.shape
    _, *strides = dense(Layout((1, *rest, outputs), (), weight.itemsize)).strides
    return Layout(weight.shape, (strides[-1], *strides[:-1]), weight.itemsize)


def _turned(
    run: Callable[..., None], x: Tensor, weight: Tensor, *given: Tensor | str | None
) -> None:
    """`run` of filters whose outputs lie along memory."""
    run(x, weight.movedim(0, -1).contiguous().movedim(-1, 0), *given)


def _in_channels_last(epilogue: _Epilogue) -> _Epilogue:
    if epilogue.residual is None:
        return epilogue
    return epilogue._replace(residual=reorder.channels_last(epilogue.residual))


def _are_vectors(weight: Layout, geometry: Geometry) -> bool:
    """Whether the channels of a group are whole vectors on both sides."""
    outputs, inputs = weight.shape[:2]
    return inputs % 8 == 0 and outputs // geometry.groups % 8 == 0


def _convolve(
    plan: _Plan,
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


def _plan_convolve(
    x: Layout,
    weight: Layout,
    y: Layout,
    geometry: Geometry,
    transposed: bool,
    precision: str,
    epilogue: _Epilogue,
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
    volume, full = len(w.taps) == 3, x.itemsize == 4 and precision == "ieee"
    own, residual = None, epilogue.residual
    if residual is not None and not are_alike(residual, y):
        own = strides(residual)
    if unit > 1:
        tiles = groups * residues
        choose = kernels.conv2d_config
        # a residual that is not laid out as y has addresses, which take registers too
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
    # flat slices cost divisions, which an eighth fewer of them pay for
    is_flat = 8 * flat <= 7 * slices
    tiles = math.ceil(pixels / block_npq) * math.ceil(w.written / block_k) * residues
    # partial sums are as large as y, in float32: only a GPU that is mostly idle is worth them
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
        # partial sums have theirs when they are added
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
    return _Plan(splits, prepared)


def _ceil_product(sizes: Sequence[int], steps: Sequence[int]) -> int:
    return math.prod(math.ceil(n / step) for n, step in zip(sizes, steps, strict=True))


def grad_weight(
    grad_output: Tensor, input: Tensor, output: Tensor, geometry: Geometry
) -> Tensor | None:
    """Partial sums (splits, K, taps, C) of `output`, or None if it has been written itself."""
    run = _way_of_grad_weight(
        Layout.of(grad_output),
        Layout.of(input),
        Layout.of(output),
        geometry,
        # the sum runs over pixels, which do not lie along memory: not for float32
        _processors("ieee", input, output, grad_output, output.shape[1]),
        launch.input_precision(input.dtype, "conv"),
    )
    return run(grad_output, input, output)


@launch.planned
def _way_of_grad_weight(
    grad_output: Layout,
    input: Layout,
    output: Layout,
    geometry: Geometry,
    count: int,
    precision: str,
) -> Callable[..., Tensor | None]:
    check_sizes(output, grad_output, input)
    products = math.prod(grad_output.shape) * math.prod(output.shape[1:])
    given = products, precision, grad_output, input
    least = reorder.MIN_OF_FILTERS if precision == "tf32" else reorder.MIN_PRODUCTS
    if _are_vectors(output, geometry) and reorder.pays(*given, least=least):
        images = reorder.channels_last(grad_output), reorder.channels_last(input)
        run = _way_of_grad_weight(*images, output, geometry, count, precision)
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
        hopper = conv_tma.plan_grad_weight(grad_output, input, output, geometry)
        if hopper is not None:
            return partial(conv_tma.grad_weight, hopper)
    return partial(_grad_weight, _plan_grad_weight(grad_output, input, output, geometry, precision))


def _grad_weight(plan: _Plan, grad_output: Tensor, input: Tensor, output: Tensor) -> Tensor | None:
    if plan.splits == 1:
        plan.run(input, grad_output, input, output)
        return None
    outputs, inputs, *taps = output.shape
    shape, dtype = (plan.splits, outputs, *taps, inputs), accumulator_dtype(input.dtype)
    sums = input.new_empty(shape, dtype=dtype)
    plan.run(input, grad_output, input, sums)
    return sums


def _plan_grad_weight(
    grad_output: Layout, input: Layout, output: Layout, geometry: Geometry, precision: str
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
    size = math.prod(output.shape)
    # of the partial sums, which are dense, or of the only one: splits, K, C and taps
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
        # few channels are a constant, whose divisions do not hide aligned vectors
        FLAT_C=inputs if inputs < 64 else 0,
        UNIT=unit,
        Y_CHANNELS_LAST=grad_output.stride(1) == 1,
        X_CHANNELS_LAST=input.stride(1) == 1,
        INDEX_64=is_wide(grad_output, input, output) or (splits > 1 and size * splits >= 2**31),
        INPUT_PRECISION=precision,
    )
    return _Plan(splits, prepared)
