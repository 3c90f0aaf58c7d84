"""What convolution kernels know of a call: strides, padding and dilation, channels by group, memory formats."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from tritorch import launch
from tritorch.ops import strided

kernels = launch.kernels("conv")


class Geometry(NamedTuple):
    """(vertical, horizontal) pairs; padding is that of the top and the left, the rest follows from the output size."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def scalars(self) -> tuple[int, ...]:
        """The kernels' arguments from `stride_h` to `dilation_w`."""
        return (*self.stride, *self.padding, *self.dilation)

    def residues(self, transposed: bool) -> tuple[int, ...]:
        """The kernels' arguments `tap_step_h` to `inverse_w`, of `residue_taps` in kernels/conv.py."""
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
    """A filter as one direction sees it: channels read and written per group, and strides (elements)."""

    read: int
    written: int
    taps: tuple[int, int]
    # group, channel written, channel read, row, column
    strides: tuple[int, int, int, int, int]


def oriented(weight: Tensor, groups: int, transposed: bool) -> Weight:
    """The filter of a convolution, or of the transposed one, which reads what the other writes."""
    outputs, inputs, *taps = weight.shape
    outputs //= groups
    over_outputs, over_inputs, *over_taps = weight.stride()
    group = outputs * over_outputs
    if transposed:
        return Weight(outputs, inputs, (taps[0], taps[1]), (group, over_inputs, over_outputs, *over_taps))
    return Weight(inputs, outputs, (taps[0], taps[1]), (group, over_outputs, over_inputs, *over_taps))


def is_channels_last(tensor: Tensor) -> bool:
    """Whether torch takes a 4-D tensor for channels_last, dense or not, by the order of its strides.

    Sizes of 1 leave the order open; they follow the strides they have, as in torch's `suggest_memory_format`.
    """
    least = 0
    if tensor.stride(1) == 0:
        return False
    for dim in (1, 3, 2, 0):
        size, stride = tensor.shape[dim], tensor.stride(dim)
        if size == 0 or stride < least:
            return False
        # both orders fit a batch of single values: torch takes it for contiguous
        if dim == 0 and least == tensor.stride(1):
            return False
        least = stride * max(size, 1)
    return True


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


@functools.cache
def pixel_blocks(n: int, p: int, q: int, block: int, channels_last: bool) -> tuple[int, int, int]:
    """Rows and columns of a tile of `block` pixels, and the number of tiles that cover n images of p x q.

    Where pixels are contiguous a tile has rows of 16 at least, which are whole sectors of memory.
    """
    found: tuple[int, int, int] = kernels.pixel_blocks(n, p, q, block, 1 if channels_last else 16)
    return found


def is_wide(*tensors: Tensor) -> bool:
    """Whether an offset into one of the tensors passes int32."""
    return any(strided.is_wide(tensor.shape, tensor.stride()) for tensor in tensors)
