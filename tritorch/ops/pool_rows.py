"""Pooling of contiguous rows in whole vectors: which windows these kernels take, and launches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tritorch import launch
from tritorch.ops import windows
from tritorch.ops.strided import Layout
from tritorch.ops.windows import Window

kernels = launch.kernels("pool_rows")
window_kernels = launch.kernels("windows")


def forward(
    kernel: Any,
    input: Layout,
    y: Layout,
    window: Window,
    numbers: Sequence[int] = (),
    **constants: Any,
) -> launch.Prepared | None:
    """The launch over the outputs y, or None where the kernels do not take the window."""
    if not _takes(window, (input, y)):
        return None
    sizes = (*_volume(input.shape[2:]), *_volume(y.shape[2:]), math.prod(y.shape))
    geometry = _geometry(window)
    if kernel is kernels.avg_pool_rows_forward_kernel:
        # average pooling has no dilation
        geometry = {name: value for name, value in geometry.items() if "DILATION" not in name}
    return _prepared(kernel, sizes, numbers, input, y, **geometry, **constants)


def backward(
    grad_output: Layout,
    grad_input: Layout,
    window: Window,
    divisor: int = 1,
    count_include_pad: bool = True,
    has_divisor: bool = False,
) -> launch.Prepared | None:
    """The launch over the input's cells, or None likewise."""
    if not _takes(window, (grad_input, grad_output)):
        return None
    sizes, counts = _volume(grad_input.shape[2:]), _volume(grad_output.shape[2:])
    extents, stride, padding, dilation = windows.split(_of_a_volume(window))
    reaching = tuple(map(window_kernels.windows_per_cell, extents[:2], stride[:2], dilation[:2]))
    first, reaching_w = kernels.column_windows(extents[2], stride[2], padding[2], dilation[2])
    reaching = (*reaching, reaching_w)
    if not window_kernels.are_held(math.prod(reaching), math.prod(stride)):
        return None
    cells = tuple(
        (size - 1 + before) // step + 1
        for size, before, step in zip(sizes[:2], padding[:2], stride[:2], strict=True)
    )
    count = math.prod((*grad_input.shape[:2], *cells, counts[2]))
    return _prepared(
        kernels.pool_rows_backward_kernel,
        (*sizes, *counts, *cells, count),
        (divisor,),
        grad_input,
        grad_output,
        **_geometry(window),
        **windows.named("NUM_Z NUM_P NUM_Q", reaching),
        FIRST_Q=first,
        APART=math.prod(reaching) == 1 and cells == counts[:2],
        COUNT_INCLUDE_PAD=count_include_pad,
        HAS_DIVISOR=has_divisor,
    )


def _takes(window: Window, images: Sequence[Layout]) -> bool:
    """Whether dense rows are as long as the steps of their windows, which are few taps."""
    extents, stride, *_ = windows.split(window)
    return (
        stride[-1] in kernels.STEPS
        and images[0].shape[-1] == images[1].shape[-1] * stride[-1]
        and math.prod(extents) <= window_kernels.MAX_UNROLL
        and all(_is_dense(image) for image in images)
    )


def _is_dense(image: Layout) -> bool:
    """Whether the elements lie in memory in the order of their indices."""
    expected = 1
    for size, stride in zip(reversed(image.shape), reversed(image.strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _volume(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(sizes) if len(sizes) == 3 else (1, *sizes)


def _of_a_volume(window: Window) -> Window:
    if len(window) == 12:
        return window
    extents, stride, padding, dilation = windows.split(window)
    return (1, *extents, 1, *stride, 0, *padding, 1, *dilation)


def _geometry(window: Window) -> dict[str, int]:
    names = "T R S", *(f"{name}_D {name}_H {name}_W" for name in ("STRIDE", "PADDING", "DILATION"))
    parts = windows.split(_of_a_volume(window))
    named = [windows.named(along, part) for along, part in zip(names, parts, strict=True)]
    return {name: number for one in named for name, number in one.items()}


def _prepared(
    kernel: Any,
    sizes: Sequence[int],
    numbers: Sequence[int],
    rows: Layout,
    outputs: Layout,
    **constants: Any,
) -> launch.Prepared:
    """`sizes` end with how many elements the tiles cover."""
    config = launch.config(kernels.pool_rows_config, rows.itemsize)
    block = config.kwargs["BLOCK"]
    programs = math.ceil(sizes[-1] / block)
    # of the input or over it, with what tiles and padding add
    reached = (programs * block + math.prod(rows.shape[-2:])) * math.prod(
        constants[f"STRIDE_{axis}"] for axis in "DHW"
    )
    return launch.Prepared(
        kernel,
        (programs,),
        (*sizes, *numbers),
        config,
        SPAN=math.gcd(outputs.shape[-1], 16 // rows.itemsize),
        INDEX_64=max(reached, math.prod(rows.shape)) > 2**31 - 1,
        **constants,
    )
