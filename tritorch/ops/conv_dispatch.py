"""Chooses the kernel of a convolution, or of the transposed one, and launches the portable kernel.

A convolution is an implicit matrix product of (pixels, taps and channels read) with (taps and
channels read, channels written); where channels do not mix, `depthwise` has its own kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritorch import launch
from tritorch.ops import conv_tma, depthwise, matmul_tma, pointwise, reorder, stem
from tritorch.ops.activation_function import computes
from tritorch.ops.geometry import (
    Geometry,
    Weight,
    are_vectors,
    check_sizes,
    is_wide,
    memory_format,
    oriented,
    planar,
    split,
    strides,
    vector_unit,
)
from tritorch.ops.reduce import accumulator_dtype, split_sum
from tritorch.ops.strided import Layout, are_alike, dense

kernels = launch.kernels("conv")

# pixels from which a copy of the filters costs less than it saves, as estimated
_MIN_PIXELS = 16384
# slices of channels that one program must have before it pays to split a sum
_MIN_SLICES = 8


class Epilogue(NamedTuple):
    """What is applied to a sum before it is stored."""

    # of the bias; None without one
    bias_stride: int | None = None
    activation: str | None = None
    keeps_preactivation: bool = False
    # whether channel moments are wanted, where a kernel can write them
    moments: bool = False
    residual: Layout | None = None


class Choice(NamedTuple):
    """The chosen launches, for tensors of known layouts."""

    # of x, weight, y, bias, activation, preactivation, moments, residual
    run: Callable[..., None]
    # parts of y whose channel moments it can write; 0 if it cannot
    parts: int = 0


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
    if depthwise.takes(weight, geometry.groups):
        given = geometry, transposed, activation, preactivation, residual
        return depthwise.convolve(x, weight, bias, y, *given)
    if weight.stride(1) != 1:
        weight = _along_channels(weight)
    bias_stride = None if bias is None else bias.stride(0)
    added = None if residual is None else Layout.of(residual)
    epilogue = Epilogue(bias_stride, activation, preactivation is not None, False, added)
    choice = _choice_for(x, weight, y, geometry, transposed, epilogue, residual)
    choice.run(x, weight, y, bias, activation, preactivation, None, residual)


def convolve_with_moments(
    x: Tensor, weight: Tensor, y: Tensor, geometry: Geometry
) -> Tensor | None:
    """Writes the convolution of x into y and returns mean, squared deviations and count of each
    channel of each part of y as stored, (parts, 3, K) float32; None if the kernel computes none.
    """
    if depthwise.takes(weight, geometry.groups):
        depthwise.convolve(x, weight, None, y, geometry, transposed=False)
        return None
    if weight.stride(1) != 1:
        weight = _along_channels(weight)
    choice = _choice_for(x, weight, y, geometry, False, Epilogue(moments=True))
    moments = None
    if choice.parts:
        moments = y.new_empty((choice.parts, 3, y.shape[1]), dtype=accumulator_dtype(y.dtype))
    choice.run(x, weight, y, None, None, None, moments, None)
    return moments


def _along_channels(weight: Tensor) -> Tensor:
    if weight.shape[1] % 8:
        return weight
    # contiguous channels: one copy of the small operand, which every tile would otherwise gather
    return weight.contiguous(memory_format=memory_format(True, weight.dim() - 2))


def _choice_for(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    geometry: Geometry,
    transposed: bool,
    epilogue: Epilogue,
    residual: Tensor | None = None,
) -> Choice:
    precision = launch.input_precision(x.dtype, "conv")
    written = (y,) if residual is None else (y, residual)
    # multiprocessors for the Hopper kernels; 0 if these do not take the tensors
    if weight.shape[1] <= stem.MAX_CHANNELS:
        # x is packed first, in 16 bits only, and may have any strides
        count = matmul_tma.processors("ieee", *written)
    else:
        count = matmul_tma.processors(precision, x, weight, *written)
    layouts = Layout.of(x), Layout.of(weight), Layout.of(y)
    return _choose(*layouts, geometry, transposed, epilogue, count, precision)


@launch.planned
def _choose(
    x: Layout,
    weight: Layout,
    y: Layout,
    geometry: Geometry,
    transposed: bool,
    epilogue: Epilogue,
    count: int,
    precision: str,
) -> Choice:
    """The first kernel that takes tensors of these layouts."""
    check_sizes(weight, x, y)
    products = math.prod((x if transposed else y).shape) * math.prod(weight.shape[1:])
    residual = epilogue.residual
    written = (y,) if residual is None else (y, residual)
    if are_vectors(weight, geometry) and reorder.pays(products, precision, x, *written):
        images = reorder.channels_last(x), reorder.channels_last(y)
        rest = geometry, transposed, _in_channels_last(epilogue), count, precision
        choice = _choose(images[0], weight, images[1], *rest)
        return choice._replace(run=partial(reorder.convolve, choice.run))
    # with erf the tile of 64 filters has no registers left for its sums
    short_of_registers = epilogue.activation == "gelu" and y.shape[1] // geometry.groups <= 64
    if count and weight.shape[1] <= stem.MAX_CHANNELS:
        if not short_of_registers and not transposed:
            # x is packed from any order
            copies = reorder.pays(products, precision, *written)
            into = reorder.channels_last(y) if copies else y
            added = _in_channels_last(epilogue).residual if copies else residual
            hopper = stem.plan_convolve(
                x, weight, into, geometry, count, added, epilogue.activation
            )
            if hopper is not None:
                run = partial(stem.convolve, hopper, geometry)
                return Choice(partial(reorder.results, run) if copies else run, hopper.parts)
    elif count:
        asked = y, geometry, transposed, epilogue, count, short_of_registers
        found = _choose_descriptors(x, weight, *asked)
        if found is None and _pays_to_copy(x, weight, transposed):
            found = _choose_descriptors(x, _outputs_last(weight), *asked)
            if found is not None:
                found = found._replace(run=partial(_with_outputs_last, found.run))
        if found is not None:
            return found
    plan = _plan_portable(x, weight, y, geometry, transposed, precision, epilogue)
    return Choice(partial(_run_portable, plan))


def _choose_descriptors(
    x: Layout,
    weight: Layout,
    y: Layout,
    geometry: Geometry,
    transposed: bool,
    epilogue: Epilogue,
    count: int,
    short_of_registers: bool,
) -> Choice | None:
    """A 1x1 convolution as one matrix product, else one product a tap; None if neither fits."""
    has_bias, residual = epilogue.bias_stride is not None, epilogue.residual
    given = x, weight, y, geometry, transposed
    product = pointwise.plan_convolve(*given, has_bias, count, epilogue.moments, residual)
    if product is not None:
        return Choice(partial(matmul_tma.run, product), product.parts)
    if short_of_registers:
        return None
    asked = count, residual, epilogue.activation, has_bias
    taps = conv_tma.plan_convolve(*given, *asked)
    return None if taps is None else Choice(partial(conv_tma.convolve, taps), taps.parts)


def _pays_to_copy(x: Layout, weight: Layout, transposed: bool) -> bool:
    """Whether descriptors may take a copy of the filters with another contiguous axis, and there
    are enough pixels to pay for it.
    """
    along = conv_tma.along_memory(weight, transposed)
    return along == 0 and math.prod(x.shape) >= _MIN_PIXELS * x.shape[1]


def _outputs_last(weight: Layout) -> Layout:
    outputs, *rest = weight.shape
    _, *strides = dense(Layout((1, *rest, outputs), (), weight.itemsize)).strides
    return Layout(weight.shape, (strides[-1], *strides[:-1]), weight.itemsize)


def _with_outputs_last(
    run: Callable[..., None], x: Tensor, weight: Tensor, *given: Tensor | str | None
) -> None:
    """`run` with a copy of the filters whose output channels are contiguous."""
    run(x, weight.movedim(0, -1).contiguous().movedim(-1, 0), *given)


def _in_channels_last(epilogue: Epilogue) -> Epilogue:
    if epilogue.residual is None:
        return epilogue
    return epilogue._replace(residual=reorder.channels_last(epilogue.residual))


class _Portable(NamedTuple):
    """A launch of `conv2d_kernel`; with `splits` above 1 partial sums are left to add."""

    splits: int
    run: launch.Prepared


def _run_portable(
    plan: _Portable,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    bias: Tensor | None,
    activation: str | None,
    preactivation: Tensor | None,
    _: None,
    residual: Tensor | None,
) -> None:
    if plan.splits == 1:
        return plan.run(y, x, weight, bias, y, preactivation, residual)
    shape, order = (plan.splits, *y.shape), (y.numel(), *y.stride())
    dtype = accumulator_dtype(y.dtype)
    sums = torch.empty_strided(shape, order, dtype=dtype, device=y.device)
    plan.run(y, x, weight, bias, sums, None, None)
    split_sum(sums, y, None, activation, preactivation, residual)


def _plan_portable(
    x: Layout,
    weight: Layout,
    y: Layout,
    geometry: Geometry,
    transposed: bool,
    precision: str,
    epilogue: Epilogue,
) -> _Portable:
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
    own, residual = None, epilogue.residual
    if residual is not None and not are_alike(residual, y):
        own = strides(residual)
    config = _config(x.itemsize, w, pixels, groups * residues, unit, precision, epilogue, own)
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
    if len(w.taps) == 3:
        depth = (
            *(x.shape[2], w.taps[0], y.shape[2]),
            *(strides(x, unit)[2], w_strides[3], strides(y, unit)[2]),
            *(geometry.stride[0], geometry.padding[0], geometry.dilation[0]),
            *(tap_steps[0], inverses[0]),
        )
    numbers = (
        *(y.shape[0], channels[0], *images[:2], channels[1], *w.taps[-2:], *images[2:]),
        *(steps, splits, 1 if epilogue.bias_stride is None else epilogue.bias_stride),
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
        HAS_BIAS=epilogue.bias_stride is not None,
        # with splits it is applied when the partial sums are added
        ACTIVATION=epilogue.activation if splits == 1 else None,
        KEEPS_PREACTIVATION=epilogue.keeps_preactivation and splits == 1,
        INPUT_PRECISION=precision,
        TRANSPOSED=transposed,
        FLAT_C=w.read if is_flat else 0,
        UNIT=unit,
        X_CHANNELS_LAST=x.stride(1) == 1,
        Y_CHANNELS_LAST=y.stride(1) == 1,
        INDEX_64=is_wide(x, weight, y, residual or y),
    )
    return _Portable(splits, prepared)


def _config(
    itemsize: int,
    w: Weight,
    pixels: int,
    tiles: int,
    unit: int,
    precision: str,
    epilogue: Epilogue,
    own: tuple[int, ...] | None,
) -> Any:
    """The configuration of so many pixels; `own` are strides of a residual that are not y's."""
    if unit == 1:
        return launch.config(kernels.conv2d_gather_config, pixels, w.written, itemsize)
    full = itemsize == 4 and precision == "ieee"
    choose = kernels.conv2d_config
    # a residual that is not laid out as y has addresses of its own, which take registers
    if itemsize == 4 and (own or (full and computes(epilogue.activation))):
        choose = kernels.conv2d_full_epilogue_config
    elif full:
        choose = kernels.conv3d_full_config if len(w.taps) == 3 else kernels.conv2d_full_config
    return launch.config(choose, pixels, w.written, tiles, itemsize)


def _ceil_product(sizes: Sequence[int], steps: Sequence[int]) -> int:
    return math.prod(math.ceil(n / step) for n, step in zip(sizes, steps, strict=True))
