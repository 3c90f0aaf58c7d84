"""Convolutions of few channels with a stride of 2, as the first one of a network.

Two by two pixels of up to four channels are packed into one of sixteen.  A row of taps then reads
pixels that lie side by side in memory: as many channels of one pixel of a view whose pixels
overlap, and what is left is a convolution of that view by filters of one column and half the rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from tritorch import launch
from tritorch.ops import conv_tma, conv_weight_tma, strided
from tritorch.ops.conv_tma import Plan
from tritorch.ops.geometry import Geometry
from tritorch.ops.reduce import many_splits_sum
from tritorch.ops.strided import Layout

kernels = launch.kernels("stem")
weight_kernels = launch.kernels("conv_weight")

# channels of a pixel, of which four are packed
MAX_CHANNELS = 4
# neighbouring packed pixels that the view presents as one
_MAX_COLUMNS = 4
_UNIT = Geometry((1, 1), (0, 0), (1, 1), 1)


class _Packed(NamedTuple):
    """Sizes of packed images, of the taps that are left, and what precedes the image."""

    rows: int
    columns: int
    taps: tuple[int, int]
    padding: tuple[int, int]

    @property
    def channels(self) -> int:
        width: int = kernels.PACKED * self.taps[1]
        return width

    def view(self, images: int, columns: int) -> Layout:
        """Pixels that overlap: as many as the output has columns."""
        row = self.columns * kernels.PACKED
        strides = self.rows * row, 1, row, kernels.PACKED
        return Layout((images, self.channels, self.rows, columns), strides, 2)

    def filters(self, outputs: int) -> Layout:
        rows, channels = self.taps[0], self.channels
        return Layout((outputs, channels, rows, 1), (rows * channels, 1, channels, channels), 2)


def _packed(size: tuple[int, ...], taps: tuple[int, ...], geometry: Geometry) -> _Packed:
    """Of images whose outputs have this size."""
    # two rows are packed from an even one on, which may be one before the first tap's
    before = [padding % 2 for padding in geometry.padding]
    rows, columns = (math.ceil((tap + one) / 2) for tap, one in zip(taps, before, strict=True))
    padding = geometry.padding[0] + before[0], geometry.padding[1] + before[1]
    return _Packed(size[0] + rows - 1, size[1] + columns - 1, (rows, columns), padding)


def _takes(weight: Layout, geometry: Geometry) -> bool:
    if len(weight.shape) != 4 or geometry.groups != 1 or weight.shape[1] > MAX_CHANNELS:
        return False
    if geometry.stride != (2, 2) or geometry.dilation != (1, 1):
        return False
    return math.ceil((weight.shape[3] + geometry.padding[1] % 2) / 2) <= _MAX_COLUMNS


def plan_convolve(
    x: Layout,
    weight: Layout,
    y: Layout,
    geometry: Geometry,
    count: int,
    residual: Layout | None = None,
    activation: str | None = None,
) -> Plan | None:
    """How to write the convolution of x into y, 16-bit numbers on 16 bytes, on so many
    multiprocessors; None if not here.  x is gathered and may lie anywhere.
    """
    if not _takes(weight, geometry):
        return None
    packed = _packed(y.shape[2:], weight.shape[2:], geometry)
    view, filters = packed.view(x.shape[0], y.shape[3]), packed.filters(y.shape[1])
    return conv_tma.plan_convolve(view, filters, y, _UNIT, False, count, residual, activation)


def convolve(
    plan: Plan,
    geometry: Geometry,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    preactivation: Tensor | None = None,
    moments: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """Writes the activation of the convolution into y, and what it is applied to into
    `preactivation`; or the moments of its parts.
    """
    packed = _packed(y.shape[2:], weight.shape[2:], geometry)
    images, filters = _pack_images(x, packed), _pack_filters(weight, packed, geometry)
    conv_tma.convolve(plan, images, filters, y, bias, activation, preactivation, moments, residual)


def _pack_images(x: Tensor, packed: _Packed) -> Tensor:
    images = x.new_empty((x.shape[0], packed.rows, packed.columns, kernels.PACKED))
    _plan_pack(packed, x.shape, x.stride())(x, x, images)
    return images


@launch.planned
def _plan_pack(
    packed: _Packed, shape: tuple[int, ...], strides: tuple[int, ...]
) -> launch.Prepared:
    pixels = shape[0] * packed.rows * packed.columns
    return launch.Prepared(
        kernels.pack_pixels_kernel,
        (math.ceil(pixels / kernels.BLOCK),),
        (pixels, *shape[1:], packed.rows, packed.columns, *packed.padding, *strides),
        INDEX_64=strided.is_wide(shape[1:], strides[1:]),
        PACKED=kernels.PACKED,
        BLOCK=kernels.BLOCK,
    )


def _pack_filters(weight: Tensor, packed: _Packed, geometry: Geometry) -> Tensor:
    """(outputs, rows, columns of packed pixels and their channels)."""
    outputs, c, r, s = weight.shape
    rows, columns = packed.taps
    before_h, before_w = (padding % 2 for padding in geometry.padding)
    after_h, after_w = 2 * rows - before_h - r, 2 * columns - before_w - s
    whole = F.pad(weight, (before_w, after_w, before_h, after_h, 0, 4 - c))
    split = whole.reshape(outputs, 4, rows, 2, columns, 2)
    return split.permute(0, 2, 4, 3, 5, 1).contiguous()


def plan_grad_weight(
    grad_output: Layout, input: Layout, output: Layout, geometry: Geometry
) -> Plan | None:
    """How to sum up the gradient of a filter from grad_output on 16 bytes; None if not here."""
    if not _takes(output, geometry):
        return None
    packed = _packed(grad_output.shape[2:], output.shape[2:], geometry)
    # rows of taps as columns, of which a program may take several at once
    view = packed.view(input.shape[0], grad_output.shape[3])
    filters = packed.filters(output.shape[0])
    return conv_weight_tma.plan(
        _rows_as_columns(grad_output), _rows_as_columns(view), _rows_as_columns(filters), _UNIT
    )


def _rows_as_columns(layout: Layout) -> Layout:
    """The same pixels, H and W exchanged."""
    (n, c, h, w), (along_n, along_c, along_h, along_w) = layout.shape, layout.strides
    return Layout((n, c, w, h), (along_n, along_c, along_w, along_h), layout.itemsize)


def grad_weight(
    plan: Plan, geometry: Geometry, grad_output: Tensor, input: Tensor, output: Tensor
) -> None:
    """Writes the gradient of the filter into `output`."""
    packed = _packed(grad_output.shape[2:], output.shape[2:], geometry)
    outputs, c, r, s = output.shape
    rows, columns = packed.taps
    sums = conv_weight_tma.partial_sums(plan, grad_output, _pack_images(input, packed))
    whole = output.new_empty((outputs, rows, columns, 2, 2, 4))
    many_splits_sum(sums, whole.view(-1), weight_kernels.SPLITS_AT_ONCE)
    whole = whole.permute(0, 5, 1, 3, 2, 4).reshape(outputs, 4, 2 * rows, 2 * columns)
    first_h, first_w = (padding % 2 for padding in geometry.padding)
    output.copy_(whole[:, :c, first_h : first_h + r, first_w : first_w + s])
