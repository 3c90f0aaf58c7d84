"""Which gradients of filters run through Hopper's tensor memory accelerator, and their launches."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from tritorch import launch
from tritorch.descriptors import View
from tritorch.ops.conv_tma import Plan, described_strides
from tritorch.ops.geometry import Geometry
from tritorch.ops.reduce import accumulator_dtype
from tritorch.ops.strided import Layout

kernels = launch.kernels("conv_weight_tma")


def plan(grad_output: Layout, input: Layout, output: Layout, geometry: Geometry) -> Plan | None:
    """The launch for the gradient of a filter, 16-bit, aligned to 16 bytes; None if not taken."""
    if len(input.shape) != 4 or input.stride(1) != 1 or grad_output.stride(1) != 1:
        return None
    (outputs, c, r, s), groups = output.shape, geometry.groups
    k = outputs // groups
    n, _, p, q = grad_output.shape
    h, w = input.shape[2:]
    # a tile along columns must end where the image does, or it would read beyond the row
    along_q = n < 24 and geometry.stride == (1, 1) and q % 16 == 0
    config = launch.config(
        kernels.conv2d_grad_weight_tma_config,
        *(k, c, s, q if along_q else n, n, p, q, geometry.stride[0]),
    )
    if config is None:
        return None
    block_k, block_c, pixels, num_taps = (
        config.kwargs[name] for name in ("BLOCK_K", "BLOCK_C", "BLOCK_PIXELS", "TAPS")
    )
    if s % num_taps or (along_q and q % pixels) or (groups > 1 and k % block_k):
        return None
    # images or tiles of columns per pixel
    each = n * (q // pixels) if along_q else math.ceil(n / pixels)
    rows = [_num_reached(h, p, tap, geometry, 0) for tap in range(r)]
    columns = [_num_reached(w, q, tap, geometry, 1) for tap in range(s)]
    if min(*rows, *columns) == 0:
        return None
    if along_q:
        columns = [1] * s
    elif num_taps > 1:
        columns = [q] * s
    tiles = math.ceil(k / block_k) * math.ceil(c / block_c)
    steps = [each * row * column for row in rows for column in columns[::num_taps]]
    weights = math.prod(output.shape)
    programs, splits, stream_k = kernels.shares(config, tiles, steps, groups, weights)
    if not stream_k and max(steps) * splits >= 2**31:
        return None
    views = (
        _tiles(grad_output, along_q, (pixels, block_k)),
        _tiles(input, along_q, (pixels, block_c)),
        View(
            (splits, outputs, r * s, c),
            (weights, r * s * c, c, 1),
            (1, block_k, 1, kernels.stored_columns(config, stream_k)),
        ),
    )
    if not all(view.is_describable(input.itemsize) for view in views):
        return None
    return Plan(
        (programs, groups if stream_k else groups * splits),
        views,
        (k, c, r, s, p, q, h, w, n if along_q else each, splits, sum(steps) * tiles * stream_k),
        geometry.scalars(),
        splits,
        None,
        0,
        config,
        {"ALONG_Q": along_q, "STREAM_K": stream_k},
        {},
    )


def _num_reached(size: int, positions: int, tap: int, geometry: Geometry, axis: int) -> int:
    """Positions along an axis of the output from which a tap reads inside the image."""
    stride = geometry.stride[axis]
    offset = tap * geometry.dilation[axis] - geometry.padding[axis]
    first, end = max(math.ceil(-offset / stride), 0), math.ceil((size - offset) / stride)
    return max(min(end, positions) - first, 0)


def _tiles(image: Layout, along_q: bool, block: Sequence[int]) -> View:
    """Rows, columns, images and channels, or images first; tiles along the last but one."""
    n, c, h, w = image.shape
    along_n, _, along_h, along_w = described_strides(image)
    if along_q:
        return View((n, h, w, c), (along_n, along_h, along_w, 1), (1, 1, *block))
    return View((h, w, n, c), (along_h, along_w, along_n, 1), (1, 1, *block))


def grad_weight(plan: Plan, grad_output: Tensor, input: Tensor, output: Tensor) -> Tensor:
    """Partial sums (splits, K, taps, C) of `output`."""
    outputs, inputs, *taps = output.shape
    return partial_sums(plan, grad_output, input).view(plan.splits, outputs, *taps, inputs)


def partial_sums(plan: Plan, grad_output: Tensor, input: Tensor) -> Tensor:
    """The same, of all taps in one dimension."""
    of_grad, of_input, of_partial = plan.views
    partial = input.new_empty(of_partial.shape, dtype=accumulator_dtype(input.dtype))
    run = plan.prepared(kernels.conv2d_grad_weight_tma_kernel)
    run(input, of_grad.at(grad_output), of_input.at(input), of_partial.at(partial))
    return partial
