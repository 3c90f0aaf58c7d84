"""Pooling windows over sequences, images and volumes: arguments, output sizes, launches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritorch import checks, launch
from tritorch.ops import geometry, strided

kernels = launch.kernels("windows")
pool_kernels = launch.kernels("pool")
kernels3d = launch.kernels("pool3d")

# one number for every axis, or one for each
Ints = int | Sequence[int]
# pixels of an adaptive output, None for the input's; as torch types its layers, all could be None,
# which raises
Counts = int | Sequence[int | None] | None
# kernel_size, stride, padding and dilation, each along every axis; of adaptive windows the largest,
# and a stride of 0
Window = tuple[int, ...]
# of one, two or three axes
_AXES = ("", "L", "H, W", "D, H, W")


def check(
    op: str,
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None,
    padding: Ints,
    dilation: Ints,
    ceil_mode: bool,
    axes: int = 2,
) -> tuple[Window, tuple[int, ...]]:
    """The window over the last `axes` axes, and the sizes of the output along them.

    Raises:
        RuntimeError: an argument that is not one number or `axes` or is out of range, padding above
            half of `kernel_size`, an input of other dimensions or with a size of 0 other than N, an
            output without a pixel.
        TypeError: an argument that is no integer, a `ceil_mode` that is neither True nor False.
    """
    kernel_size = checks.ints(op, "kernel_size", kernel_size, axes)
    # torch takes an empty stride for none
    if stride is None or (isinstance(stride, (tuple, list)) and not stride):
        stride = kernel_size
    else:
        stride = checks.ints(op, "stride", stride, axes)
    padding = checks.ints(op, "padding", padding, axes)
    dilation = checks.ints(op, "dilation", dilation, axes)
    return _checked(op, input.shape, kernel_size, stride, padding, dilation, ceil_mode)


@checks.remembered
def _checked(
    op: str,
    input: torch.Size,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    ceil_mode: bool,
) -> tuple[Window, tuple[int, ...]]:
    axes = len(kernel_size)
    checks.flag(op, "ceil_mode", ceil_mode)
    for name, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation)):
        if min(value) < 1:
            checks.fail(RuntimeError, op, f"{name} must be positive", **{name: value})
    if any(not 0 <= 2 * p <= k for p, k in zip(padding, kernel_size, strict=True)):
        checks.fail(
            RuntimeError,
            op,
            "padding must be from 0 to half of kernel_size",
            padding=padding,
            kernel_size=kernel_size,
        )
    if len(input) not in (axes + 1, axes + 2) or 0 in input[-axes - 1 :]:
        rule = f"input must be {shapes(axes)}, and no size but N may be 0"
        checks.fail(RuntimeError, op, rule, input=input)
    size = tuple(
        _output_size(*axis, ceil_mode)
        for axis in zip(input[-axes:], kernel_size, stride, padding, dilation, strict=True)
    )
    if min(size) < 1:
        checks.fail(
            RuntimeError,
            op,
            "no window fits into the padded input",
            input=input,
            kernel_size=kernel_size,
            padding=padding,
            dilation=dilation,
        )
    return (*kernel_size, *stride, *padding, *dilation), size


def divisor(op: str, given: int) -> int:
    """What sums are divided by instead of their number of pixels: TypeError unless an integer,
    RuntimeError if 0.
    """
    number: int = checks.integer(op, "divisor_override", given)
    if number == 0:
        checks.fail(RuntimeError, op, "divisor_override must not be 0", received=given)
    return number


def shapes(axes: int) -> str:
    """The shapes that an input may have."""
    return f"(N, C, {_AXES[axes]}) or (C, {_AXES[axes]})"


def split(window: Window) -> tuple[tuple[int, ...], ...]:
    """kernel_size, stride, padding and dilation."""
    axes = len(window) // 4
    return tuple(window[i : i + axes] for i in range(0, len(window), axes))


def adaptive_size(
    op: str,
    input: Tensor,
    output_size: Counts,
    axes: int,
    channels: bool = True,
    averages: bool = False,
) -> tuple[int, ...]:
    """The sizes of an adaptive output; None keeps the input's.

    `channels`: whether torch wants some of them.  `averages`: whether the one window of an image
    may be of any image at all, as it is for torch's mean over the last axes.

    Raises:
        IndexError: an input without the axes of such a mean.
        RuntimeError: numbers that are not `axes` or are negative, an input of other dimensions or
            with a size of 0 along a pooled axis, or of its second.
        TypeError: an `output_size` that is neither an integer nor several.
        ValueError: as many sizes as the input has dimensions, or more.
    """
    size = _given_size(op, input, output_size, axes)
    if min(size) < 0:
        checks.fail(RuntimeError, op, "output_size must not be negative", output_size=output_size)
    fits = input.dim() in (axes + 1, axes + 2)
    if averages and set(size) == {1} and (fits or axes > 1):
        if input.dim() < axes:
            rule = f"input must be {shapes(axes)}"
            checks.fail(IndexError, op, rule, input=input)
        return size
    needed = input.shape[1:] if channels else input.shape[-axes:]
    if not fits or 0 in needed:
        rule = f"input must be {shapes(axes)}, and no size but N may be 0"
        checks.fail(RuntimeError, op, rule, input=input)
    return size


def _given_size(op: str, input: Tensor, output_size: Counts, axes: int) -> tuple[int, ...]:
    if isinstance(output_size, (int, torch.SymInt)):
        return checks.ints(op, "output_size", output_size, axes)
    if axes == 1:
        # torch has no None for one axis
        return checks.ints(op, "output_size", output_size, axes)  # type: ignore[arg-type]
    try:
        given = tuple(output_size)  # type: ignore[arg-type]
    except TypeError:
        checks.fail(TypeError, op, "output_size must be integers", output_size=output_size)
    if input.dim() <= len(given):
        # torch compares the two before it looks at either
        rule = f"input must be {shapes(axes)}"
        checks.fail(ValueError, op, rule, input=input, output_size=output_size)
    last = input.shape[input.dim() - len(given) :]
    kept = tuple(n if count is None else count for n, count in zip(last, given, strict=True))
    size = checks.ints(op, "output_size", kept, axes)
    # one of them does not stand for all
    if len(given) != axes:
        rule = f"output_size must be one integer or {axes} of them"
        checks.fail(RuntimeError, op, rule, output_size=output_size)
    return size


def adaptive(sizes: Sequence[int], counts: Sequence[int]) -> Window:
    """`counts` windows that cover pixels of `sizes`: alike where the counts divide, else adaptive.

    Source: `start_index` and `end_index` of torch.
    """
    if divide(sizes, counts):
        extents = tuple(size // count for size, count in zip(sizes, counts, strict=True))
        stride = extents
    else:
        extents = tuple(largest(size, count) for size, count in zip(sizes, counts, strict=True))
        stride = (0,) * len(extents)
    return (*extents, *stride, *(0,) * len(extents), *(1,) * len(extents))


def divide(sizes: Sequence[int], counts: Sequence[int]) -> bool:
    """Whether so many windows are alike."""
    return not any(size % count for size, count in zip(sizes, counts, strict=True))


def largest(size: int, count: int) -> int:
    """Pixels of the largest of `count` windows over `size` pixels."""
    # torch.compile knows no math.gcd of sizes that a program leaves open
    common, rest = count, size % count
    while rest:
        common, rest = rest, common % rest
    # a window starts at most count - gcd parts of a pixel after the pixel's start
    return -(-(size + count - common) // count)


def is_adaptive(window: Window) -> bool:
    return window[len(window) // 4] == 0


def multiplies_beyond_int32(sizes: Sequence[int], counts: Sequence[int]) -> bool:
    """Whether the arithmetic of adaptive windows passes int32."""
    return any(
        (size + 1) * (count + 1) > 2**31 - 1 for size, count in zip(sizes, counts, strict=True)
    )


def _output_size(
    size: int, kernel_size: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> int:
    room = size + 2 * padding - dilation * (kernel_size - 1) - 1
    if not ceil_mode:
        return room // stride + 1
    count = -(-room // stride) + 1
    # the last window starts inside the image or the padding before it
    return count - 1 if (count - 1) * stride >= size + padding else count


def empty(like: Tensor, size: Sequence[int], channels_last: bool, dtype: torch.dtype) -> Tensor:
    """Uninitialised images or volumes on the device of `like`."""
    memory_format = torch.channels_last if len(size) == 4 else torch.channels_last_3d
    return torch.empty(
        size,
        dtype=dtype,
        device=like.device,
        memory_format=memory_format if channels_last else torch.contiguous_format,
    )


def counts(counts: Sequence[int]) -> dict[str, Any]:
    """How many windows meet in a pixel, as kernels take it at compile time."""
    return {**named("NUM_Z NUM_P NUM_Q", counts), "UNROLL": kernels.unrolled_taps(*counts)}


def named(names: str, numbers: Sequence[int]) -> dict[str, Any]:
    """Numbers along the last axes by the kernels' names."""
    return dict(zip(names.split()[-len(numbers) :], numbers, strict=True))


def prepared(
    kernel: Any,
    sizes: Sequence[int],
    pixels: int,
    images: Sequence[strided.Layout],
    spacing: Sequence[int],
    wide: bool = False,
    flat: bool = False,
    **constants: Any,
) -> launch.Prepared:
    """A launch of a kernel of kernels/pool.py, or one with such a tile, over `pixels` times
    channels.

    The kernel takes tensors, `sizes`, `pixels`, the strides of `images` and `spacing`; the last of
    `images` is written.  `wide`: whether it computes numbers beyond int32 besides offsets.
    `flat`: whether volumes are images of one slice.
    """
    written = images[-1]
    channels, channels_last = written.shape[1], written.stride(1) == 1
    if len(written.shape) == 4 or flat:
        config = launch.config(pool_kernels.pool_config, channels_last, channels, written.itemsize)
    else:
        config = launch.config(kernels3d.pool3d_config, channels_last, written.itemsize)
    block_pixels, block_c = config.kwargs["BLOCK_PIXELS"], config.kwargs["BLOCK_C"]
    return launch.Prepared(
        kernel,
        (math.ceil(pixels / block_pixels) * math.ceil(channels / block_c),),
        (*sizes, pixels, *(stride for layout in images for stride in layout.strides), *spacing),
        config,
        # with padding there can be more pixels than the tensors have
        INDEX_64=wide
        or geometry.is_wide(*images)
        or strided.is_wide((pixels + block_pixels,), (1,)),
        **constants,
    )
