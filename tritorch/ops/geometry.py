"""What convolution kernels know of a call: steps over the image, channels, memory formats.

An image has two axes, rows and columns; a volume has the depth before them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tritorch import launch
from tritorch.ops import strided
from tritorch.ops.strided import Layout

kernels = launch.kernels("pixels")
reduce_kernels = launch.kernels("reduce")


# what one launch may count in int32: pixels, and weights
MAX_INDEX = 2**30


def check_sizes(weight: Layout, *images: Layout) -> None:
    """RuntimeError where a program that was traced for any size meets one that is too large."""
    pixels = max(one.shape[0] * math.prod(one.shape[2:]) for one in images)
    if max(pixels, math.prod(weight.shape)) > MAX_INDEX:
        raise RuntimeError(
            "convolution: a compiled or exported program has at most 2**30 pixels or weights "
            f"(weight {tuple(weight.shape)}, images {[tuple(one.shape) for one in images]})"
        )


class Geometry(NamedTuple):
    """Numbers along each axis; of the padding those before the image, its size tells the rest."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(
        cls, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
    ) -> Geometry:
        """From the lists that a library op receives."""
        return tuple.__new__(cls, (tuple(stride), tuple(padding), tuple(dilation), groups))

    def scalars(self) -> tuple[int, ...]:
        """The kernels' arguments from `stride_h` to `dilation_w`."""
        return (*self.stride[-2:], *self.padding[-2:], *self.dilation[-2:])

    def residues(self, transposed: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """`tap_step` and `inverse` along each axis, for `residue_taps` of pixels.py."""
        if not transposed:
            return (1,) * len(self.stride), (0,) * len(self.stride)
        gcds = [math.gcd(s, d) for s, d in zip(self.stride, self.dilation, strict=True)]
        steps = [stride // gcd for stride, gcd in zip(self.stride, gcds, strict=True)]
        inverses = [
            pow(dilation // gcd, -1, step)
            for dilation, gcd, step in zip(self.dilation, gcds, steps, strict=True)
        ]
        return tuple(steps), tuple(inverses)


class Weight(NamedTuple):
    """A filter as one direction sees it: channels per group, taps, strides in elements."""

    read: int
    written: int
    taps: tuple[int, ...]
    # group, channel written, channel read, axes
    strides: tuple[int, ...]


def oriented(weight: Layout, groups: int, transposed: bool) -> Weight:
    """The filter of a convolution, or of the transposed one, which reads what the other writes."""
    outputs, inputs, *taps = weight.shape
    outputs //= groups
    over_outputs, over_inputs, *axes = strides(weight)
    group = outputs * over_outputs
    if transposed:
        return Weight(outputs, inputs, tuple(taps), (group, over_inputs, over_outputs, *axes))
    return Weight(inputs, outputs, tuple(taps), (group, over_outputs, over_inputs, *axes))


def strides(tensor: Layout, unit: int = 1) -> tuple[int, ...]:
    """Strides of images, divided by `unit` but for the channels; 0 along an axis of one pixel.

    There torch's stride may be anything, and no offset uses it.
    """
    n, c, *axes = tensor.strides
    return (
        n // unit,
        c,
        *(
            stride // unit if size > 1 else 0
            for size, stride in zip(tensor.shape[2:], axes, strict=True)
        ),
    )


def planar(numbers: Sequence[int]) -> tuple[int, ...]:
    """Those of (batch, channels, axes...) that are not along the depth."""
    return (*numbers[:2], *numbers[-2:])


def vector_unit(x: Layout, y: Layout, *numbers: int) -> int:
    """8 if all channels are contiguous and 8 divides everything else, strides and numbers; or 1.

    The kernels take those numbers in this unit, so that the compiler sees vectors of 16 bytes as
    aligned: by itself Triton tells apart the multiples of 16 alone.
    """
    if x.stride(1) != 1 or y.stride(1) != 1:
        return 1
    (x_n, _, *x_axes), (y_n, _, *y_axes) = strides(x), strides(y)
    others = x_n, *x_axes, y_n, *y_axes, *numbers
    return 1 if any(number % 8 for number in others) else 8


def are_vectors(weight: Layout, geometry: Geometry) -> bool:
    """Whether the channels of a group, read and written, are multiples of 8."""
    outputs, inputs = weight.shape[:2]
    return inputs % 8 == 0 and outputs // geometry.groups % 8 == 0


def split(programs: int, steps: int, min_steps: int) -> tuple[int, int]:
    """Into how many sums one of `steps` is split to fill a GPU from `programs`; steps of each."""
    splits = reduce_kernels.num_splits(programs, steps, min_steps)
    steps_each = math.ceil(steps / splits)
    return (math.ceil(steps / steps_each) if steps else 1), steps_each


def is_channels_last(tensor: Tensor) -> bool:
    """Whether torch takes images or volumes for channels_last: by the order of strides alone.

    Source: `suggest_memory_format` of torch, which also decides what sizes of 1 leave open.
    """
    shape, strides = tensor.shape, tensor.stride()
    least = 0
    if strides[1] == 0:
        return False
    for dim in (1, *range(len(shape) - 1, 1, -1), 0):
        size, stride = shape[dim], strides[dim]
        if size == 0 or stride < least:
            return False
        # both orders fit a batch of single values: torch takes it for contiguous
        if dim == 0 and least == strides[1]:
            return False
        least = stride * max(size, 1)
    return True


def memory_format(channels_last: bool, axes: int = 2) -> torch.memory_format:
    """torch's name for a format of images of two axes, or of volumes of three."""
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last if axes == 2 else torch.channels_last_3d


@functools.lru_cache(maxsize=1024)
def pixel_blocks(n: int, p: int, q: int, block: int, channels_last: bool) -> tuple[int, int, int]:
    """Rows and columns of a tile of `block` pixels, and how many tiles cover n images of p x q.

    Where pixels are contiguous a tile has rows of 16 at least, which are whole sectors of memory.
    """
    found: tuple[int, int, int] = kernels.pixel_blocks(n, p, q, block, 1 if channels_last else 16)
    return found


def is_wide(*tensors: Layout) -> bool:
    """Whether an offset into one of the tensors passes int32."""
    return any(strided.is_wide(tensor.shape, tensor.strides) for tensor in tensors)
