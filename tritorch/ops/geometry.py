"""What convolution kernels know of a call: steps over the image, channels, memory formats."""

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

kernels = launch.kernels("conv")
reduce_kernels = launch.kernels("reduce")


class Geometry(NamedTuple):
    """(vertical, horizontal) pairs; of the padding top and left, the output size tells the rest."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(
        cls, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
    ) -> Geometry:
        """From the lists that a library op receives."""
        (s_h, s_w), (p_h, p_w), (d_h, d_w) = stride, padding, dilation
        return cls((s_h, s_w), (p_h, p_w), (d_h, d_w), groups)

    def scalars(self) -> tuple[int, ...]:
        """The kernels' arguments from `stride_h` to `dilation_w`."""
        return (*self.stride, *self.padding, *self.dilation)

    def residues(self, transposed: bool) -> tuple[int, ...]:
        """The kernels' arguments `tap_step_h` to `inverse_w`, for `residue_taps` of conv.py."""
        if not transposed:
            return 1, 1, 0, 0
        gcds = [math.gcd(s, d) for s, d in zip(self.stride, self.dilation, strict=True)]
        steps = [stride // gcd for stride, gcd in zip(self.stride, gcds, strict=True)]
        inverses = [
            pow(dilation // gcd, -1, step)
            for dilation, gcd, step in zip(self.dilation, gcds, steps, strict=True)
        ]
        return (*steps, *inverses)


class Weight(NamedTuple):
    """A filter as one direction sees it: channels per group, taps, strides in elements."""

    read: int
    written: int
    taps: tuple[int, int]
    # group, channel written, channel read, row, column
    strides: tuple[int, int, int, int, int]


def oriented(weight: Layout, groups: int, transposed: bool) -> Weight:
    """The filter of a convolution, or of the transposed one, which reads what the other writes."""
    outputs, inputs, r, s = weight.shape
    outputs //= groups
    over_outputs, over_inputs, row, column = strides(weight)
    group = outputs * over_outputs
    if transposed:
        return Weight(outputs, inputs, (r, s), (group, over_inputs, over_outputs, row, column))
    return Weight(inputs, outputs, (r, s), (group, over_outputs, over_inputs, row, column))


def strides(tensor: Layout, unit: int = 1) -> tuple[int, int, int, int]:
    """Strides of a 4-D tensor, divided by `unit` but for the channels; 0 along a single pixel.

    There torch's stride may be anything, and no offset uses it.
    """
    n, c, h, w = tensor.strides
    rows, columns = tensor.shape[2:]
    return n // unit, c, h // unit if rows > 1 else 0, w // unit if columns > 1 else 0


def vector_unit(x: Layout, y: Layout, *numbers: int) -> int:
    """8 if all channels are contiguous and 8 divides everything else, strides and numbers; or 1.

    The kernels take those numbers in this unit, so that the compiler sees vectors of 16 bytes as
    aligned: by itself Triton tells apart the multiples of 16 alone.
    """
    if x.stride(1) != 1 or y.stride(1) != 1:
        return 1
    others = *strides(x)[::2], strides(x)[3], *strides(y)[::2], strides(y)[3], *numbers
    return 1 if any(number % 8 for number in others) else 8


def split(programs: int, steps: int, min_steps: int) -> tuple[int, int]:
    """Into how many sums one of `steps` is split to fill a GPU from `programs`; steps of each."""
    splits = reduce_kernels.num_splits(programs, steps, min_steps)
    steps_each = math.ceil(steps / splits)
    return (math.ceil(steps / steps_each) if steps else 1), steps_each


def is_channels_last(tensor: Tensor) -> bool:
    """Whether torch takes a 4-D or 5-D tensor for channels_last: by the order of strides, dense or
    not.

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


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


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
