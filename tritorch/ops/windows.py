"""Windows over images: their arguments, their outputs, launches over pixels and channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritorch import checks, launch
from tritorch.ops import geometry, strided

kernels = launch.kernels("pool")

# one number for height and width, or one for each
Ints = int | Sequence[int]
# kernel_size, stride, padding and dilation, height and width of each
Window = tuple[int, ...]


def check(
    op: str,
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None,
    padding: Ints,
    dilation: Ints,
    ceil_mode: bool,
) -> tuple[Window, tuple[int, int]]:
    """The window, and height and width of the output.

    Raises:
        RuntimeError: an argument that is not one number or two or is out of range, padding above
            half of `kernel_size`, an input that is not (N, C, H, W) or (C, H, W) or has a size of 0
            other than N, an output without a pixel.
    """
    kernel_size = checks.ints(op, "kernel_size", kernel_size, 2)
    # torch takes an empty stride for none
    stride = kernel_size if stride in (None, (), []) else checks.ints(op, "stride", stride, 2)
    padding = checks.ints(op, "padding", padding, 2)
    dilation = checks.ints(op, "dilation", dilation, 2)
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
    if input.dim() not in (3, 4) or 0 in input.shape[-3:]:
        checks.fail(
            RuntimeError,
            op,
            "input must be (N, C, H, W) or (C, H, W), and no size but N may be 0",
            input=input,
        )
    p, q = (
        _output_size(*axis, ceil_mode)
        for axis in zip(input.shape[-2:], kernel_size, stride, padding, dilation, strict=True)
    )
    if p < 1 or q < 1:
        checks.fail(
            RuntimeError,
            op,
            "no window fits into the padded input",
            input=input,
            kernel_size=kernel_size,
            padding=padding,
            dilation=dilation,
        )
    return (*kernel_size, *stride, *padding, *dilation), (p, q)


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
    """Uninitialised images on the device of `like`."""
    return torch.empty(
        size,
        dtype=dtype,
        device=like.device,
        memory_format=geometry.memory_format(channels_last),
    )


def run(
    kernel: Any,
    pointers: Sequence[Tensor | None],
    sizes: Sequence[int],
    pixels: int,
    images: Sequence[Tensor],
    spacing: Sequence[int],
    **constants: Any,
) -> None:
    """Launches a kernel of kernels/pool.py over `pixels` times channels.

    The kernel takes `pointers`, `sizes`, `pixels`, the strides of `images` and `spacing`; the last
    of `images` is written.
    """
    written = images[-1]
    channels = written.shape[1]
    config = launch.config(
        kernels.pool_config, written.stride(1) == 1, channels, written.element_size()
    )
    block_pixels, block_c = config.kwargs["BLOCK_PIXELS"], config.kwargs["BLOCK_C"]
    launch.run(
        kernel,
        (math.ceil(pixels / block_pixels) * math.ceil(channels / block_c),),
        *pointers,
        *sizes,
        pixels,
        *(stride for tensor in images for stride in tensor.stride()),
        *spacing,
        on=written,
        config=config,
        # with padding there can be more pixels than the tensors have
        INDEX_64=geometry.is_wide(*map(strided.Layout.of, images))
        or strided.is_wide((pixels + block_pixels,), (1,)),
        **constants,
    )
