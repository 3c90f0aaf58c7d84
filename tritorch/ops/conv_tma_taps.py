"""Which taps of a tile read nothing of the image, as the Hopper kernel counts them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from tritorch.ops.geometry import Geometry, Weight
from tritorch.ops.strided import Layout

# the share of all taps that must read nothing before they are left out: programs with several tiles
# count theirs first
_FEW_TAPS = 1 / 16


def leaves_out(
    x: Layout,
    y: Layout,
    w: Weight,
    geometry: Geometry,
    transposed: bool,
    blocks: Sequence[int],
) -> bool:
    """Whether enough taps of tiles of so many rows and columns read nothing of x."""
    left = taken = 1
    for axis, block in enumerate(blocks):
        # the only tap of an axis is never left out
        if w.taps[axis] > 1:
            each = list(taps_of_tiles(axis, x, y, w, geometry, transposed, block))
            left *= sum(tiles * one for one, _, tiles in each)
            taken *= sum(tiles * all_taps for _, all_taps, tiles in each)
    return left <= (1 - _FEW_TAPS) * taken


def taps_of_tiles(
    axis: int,
    x: Layout,
    y: Layout,
    w: Weight,
    geometry: Geometry,
    transposed: bool,
    block: int,
) -> Iterator[tuple[int, int, int]]:
    """Of tiles of `block` pixels along an axis of y, of all residues: the taps that the kernel does
    not leave out, as `_reaching` in kernels/conv_tma.py counts them, all of them, and how many
    tiles in a row have these numbers.
    """
    size, pixels, taps = x.shape[axis + 2], y.shape[axis + 2], w.taps[axis]
    stride, padding, dilation = (numbers[axis] for numbers in geometry[:3])
    if not transposed:
        starts = range(-padding, pixels * stride - padding, block * stride)
        low, high = -(block - 1) * stride, size - dilation * (taps - 1)
        for start, tiles in _runs(starts, low, high):
            before = max(math.ceil(-(start + (block - 1) * stride) / dilation), 0)
            end = math.ceil((size - start) / dilation)
            yield _left(before, end, taps), taps, tiles
        return
    inverse = geometry.residues(True)[1][axis]
    for residue in range(stride):
        # as `residue_taps` of kernels/pixels.py, of a stride that has no factor of the dilation
        first = (residue + padding) * inverse % stride
        number = math.ceil((taps - first) / stride)
        origin = (residue + padding - first * dilation) // stride
        starts = range(origin, origin + math.ceil(pixels / stride), block)
        for start, tiles in _runs(starts, dilation * (number - 1) - block + 1, size):
            before = max((start - size) // dilation + 1, 0)
            end = (start + block - 1) // dilation + 1
            yield _left(before, end, number), number, tiles


def _runs(starts: range, low: int, high: int) -> Iterator[tuple[int, int]]:
    """The starts, each with 1, but of those from `low` to below `high` the first with their number:
    away from the edges, where most tiles are, all taps read pixels.
    """
    first, end = (
        min(max(math.ceil((edge - starts.start) / starts.step), 0), len(starts))
        for edge in (low, high)
    )
    if first >= end:
        first = end = len(starts)
    yield from ((start, 1) for start in starts[:first])
    if first < end:
        yield starts[first], end - first
    yield from ((start, 1) for start in starts[end:])


def _left(before: int, end: int, taps: int) -> int:
    return max(min(end, taps) - min(before, taps - 1), 1)
