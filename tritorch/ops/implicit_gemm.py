"""Chooses the kernel of a convolution, an implicit matrix product of (pixels, taps and channels
read) with (taps and channels read, channels written): the first one that takes the call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from tritorch import launch
from tritorch.ops import (
    conv_portable,
    conv_tma,
    conv_weight_tma,
    matmul_tma,
    pointwise,
    reorder,
    stem,
)
from tritorch.ops.conv_portable import Epilogue
from tritorch.ops.geometry import (
    Geometry,
    check_sizes,
    memory_format,
)
from tritorch.ops.reduce import accumulator_dtype
from tritorch.ops.strided import Layout, dense

# pixels from which a copy of the filters costs less than it saves, as estimated
_MIN_PIXELS = 16384


class _Way(NamedTuple):
    """The chosen launches, for tensors of known layouts."""

    # of x, weight, y, bias, activation, the values before it, moments, residual
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
    epilogue = Epilogue(stride, activation, before is not None, False, added)
    way = _way_of(x, weight, y, geometry, transposed, epilogue, residual)
    way.run(x, weight, y, bias, activation, before, None, residual)


def convolve_with_moments(
    x: Tensor, weight: Tensor, y: Tensor, geometry: Geometry
) -> Tensor | None:
    """Writes the convolution of x into y and returns mean, squared deviations and count of each
    channel of each part of y as stored, (parts, 3, K) float32; None if the kernel computes none.
    """
    if weight.stride(1) != 1:
        weight = _along_channels(weight)
    way = _way_of(x, weight, y, geometry, False, Epilogue(moments=True))
    moments = None
    if way.parts:
        moments = y.new_empty((way.parts, 3, y.shape[1]), dtype=accumulator_dtype(y.dtype))
    way.run(x, weight, y, None, None, None, moments, None)
    return moments


def _along_channels(weight: Tensor) -> Tensor:
    if weight.shape[1] % 8:
        return weight
    # contiguous channels: one copy of the small operand, which every tile would otherwise gather
    return weight.contiguous(memory_format=memory_format(True, weight.dim() - 2))


def _way_of(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    geometry: Geometry,
    transposed: bool,
    epilogue: Epilogue,
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
    """Multiprocessors for the Hopper kernels; 0 if these do not take the tensors."""
    written = (y,) if residual is None else (y, residual)
    if channels <= stem.MAX_CHANNELS:
        # x is packed first, in 16 bits only, and may have any strides
        return matmul_tma.processors("ieee", *written)
    return matmul_tma.processors(precision, first, second, *written)


@launch.planned
def _way(
    x: Layout,
    weight: Layout,
    y: Layout,
    geometry: Geometry,
    transposed: bool,
    epilogue: Epilogue,
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
    # with erf the tile of 64 filters has no registers left for its sums
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
    plan = conv_portable.plan_convolve(x, weight, y, geometry, transposed, precision, epilogue)
    return _Way(partial(conv_portable.convolve, plan))


def _way_of_descriptors(
    x: Layout,
    weight: Layout,
    y: Layout,
    geometry: Geometry,
    transposed: bool,
    epilogue: Epilogue,
    count: int,
    crowded: bool,
) -> _Way | None:
    """A 1x1 convolution as one matrix product, else one product a tap; None if neither fits."""
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
    """Whether descriptors may take a copy of the filters with another contiguous axis, and there
    are enough pixels to pay for it.
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
    """`run` with a copy of the filters whose output channels are contiguous."""
    run(x, weight.movedim(0, -1).contiguous().movedim(-1, 0), *given)


def _in_channels_last(epilogue: Epilogue) -> Epilogue:
    if epilogue.residual is None:
        return epilogue
    return epilogue._replace(residual=reorder.channels_last(epilogue.residual))


def _are_vectors(weight: Layout, geometry: Geometry) -> bool:
    """Whether the channels of a group, read and written, are multiples of 8."""
    outputs, inputs = weight.shape[:2]
    return inputs % 8 == 0 and outputs // geometry.groups % 8 == 0


def grad_weight(
    grad_output: Tensor, input: Tensor, output: Tensor, geometry: Geometry
) -> Tensor | None:
    """Partial sums (splits, K, taps, C) of `output`, or None if it has been written itself."""
    run = _way_of_grad_weight(
        Layout.of(grad_output),
        Layout.of(input),
        Layout.of(output),
        geometry,
        # the sum runs over pixels, which are not contiguous: not for TF32
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
        hopper = conv_weight_tma.plan(grad_output, input, output, geometry)
        if hopper is not None:
            return partial(conv_weight_tma.grad_weight, hopper)
    plan = conv_portable.plan_grad_weight(grad_output, input, output, geometry, precision)
    return partial(conv_portable.grad_weight, plan)
