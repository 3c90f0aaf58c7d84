"""Max pooling of images and volumes: launches, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritorch import binding, launch
from tritorch.ops import pool_rows, windows
from tritorch.ops.geometry import is_channels_last
from tritorch.ops.strided import Layout
from tritorch.ops.windows import Window

kernels = launch.kernels("pool")
kernels3d = launch.kernels("pool3d")
rows_kernels = launch.kernels("pool_rows")
window_kernels = launch.kernels("windows")


def _outputs(
    input: Tensor, window: Window, size: Sequence[int], keep_taps: bool, return_indices: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, taps and indices; empty where not wanted."""
    channels_last = is_channels_last(input)
    shape = (*input.shape[:2], *size)
    cells = math.prod(window[: len(size)])
    taps_dtype = torch.uint8 if cells <= 256 else torch.int32

    def empty(dtype: torch.dtype, wanted: bool = True) -> Tensor:
        if not wanted:
            return torch.empty(0, dtype=dtype, device=input.device)
        return windows.empty(input, shape, channels_last, dtype)

    return empty(input.dtype), empty(taps_dtype, keep_taps), empty(torch.int64, return_indices)


@binding.library_op(
    "max_pool_forward(Tensor input, int[] window, SymInt[] size, bool keep_taps, "
    "bool return_indices) -> (Tensor, Tensor, Tensor)",
    fake=_outputs,
)
def _max_pool_forward(
    input: Tensor, window: Window, size: Sequence[int], keep_taps: bool, return_indices: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, taps, indices = _outputs(input, window, size, keep_taps, return_indices)
    given = tuple(window), keep_taps, return_indices
    run = _plan_max_pool(Layout.of(input), Layout.of(y), *given)
    run(y, input, y, taps if keep_taps else None, indices if return_indices else None)
    return y, taps, indices


@launch.planned
def _plan_max_pool(
    input: Layout, y: Layout, window: Window, keep_taps: bool, return_indices: bool
) -> launch.Prepared:
    size = y.shape[2:]
    kept: dict[str, Any] = {"HAS_TAPS": keep_taps, "HAS_INDICES": return_indices}
    rows = pool_rows.forward(rows_kernels.max_pool_rows_forward_kernel, input, y, window, **kept)
    if rows is not None:
        return rows
    extents, *spacing = windows.split(window)
    return windows.prepared(
        kernels.max_pool2d_forward_kernel
        if len(size) == 2
        else kernels3d.max_pool3d_forward_kernel,
        (*input.shape[1:], *size),
        input.shape[0] * math.prod(size),
        (input, y),
        [number for numbers in spacing for number in numbers],
        **_adaptive(window, input.shape[2:], size),
        **windows.named("T R S", extents),
        UNROLL=window_kernels.unrolled_taps(*extents),
        **kept,
    )


def _adaptive(window: Window, sizes: Sequence[int], counts: Sequence[int]) -> dict[str, Any]:
    """The constants that tell the 2d kernels whether windows are adaptive."""
    if len(counts) == 3:
        return {}
    adaptive = windows.is_adaptive(window)
    wide = adaptive and windows.multiplies_beyond_int32(sizes, counts)
    return {"ADAPTIVE": adaptive, "wide": wide}


def _grad_input(
    grad_output: Tensor, taps: Tensor, window: Window, shape: Sequence[int], channels_last: bool
) -> Tensor:
    return windows.empty(grad_output, shape, channels_last, grad_output.dtype)


@binding.library_op(
    "max_pool_backward(Tensor grad_output, Tensor taps, int[] window, SymInt[] shape, "
    "bool channels_last) -> Tensor",
    fake=_grad_input,
)
def _max_pool_backward(
    grad_output: Tensor, taps: Tensor, window: Window, shape: Sequence[int], channels_last: bool
) -> Tensor:
    grad_input = _grad_input(grad_output, taps, window, shape, channels_last)
    images = (grad_output, taps, grad_input)
    _plan_max_pool_backward(tuple(window), *map(Layout.of, images))(grad_input, *images)
    return grad_input


@launch.planned
def _plan_max_pool_backward(window: Window, *images: Layout) -> launch.Prepared:
    (_, _, *size), (n, c, *pixels) = images[0].shape, images[-1].shape
    sizes = (c, *pixels, *size)
    rows = pool_rows.backward(images[0], images[-1], window)
    if rows is not None:
        return rows
    extents, stride, padding, dilation = windows.split(window)
    adaptive = windows.is_adaptive(window)
    if (
        len(size) == 2
        and not adaptive
        and window_kernels.holds_windows(*extents, *stride, *dilation)
    ):
        cells = tuple(
            (size - 1 + before) // step + 1
            for size, before, step in zip(pixels, padding, stride, strict=True)
        )
        return windows.prepared(
            kernels.max_pool2d_backward_kernel,
            (*sizes, *cells),
            n * math.prod(cells),
            images,
            padding,
            **windows.named("R S", extents),
            **windows.named("STRIDE_H STRIDE_W", stride),
            **windows.named("DILATION_H DILATION_W", dilation),
        )
    if adaptive:
        counts = tuple(map(windows.largest, size, pixels))
    else:
        counts = tuple(map(window_kernels.windows_per_cell, extents, stride, dilation))
    over_pixels = (sizes, n * math.prod(pixels), images)
    if len(size) == 2:
        kernel = kernels.max_pool2d_backward_loop_kernel
        spacing = (*extents, *counts, *window[2:])
        return windows.prepared(kernel, *over_pixels, spacing, **_adaptive(window, pixels, size))
    kernel = kernels3d.max_pool3d_backward_kernel
    return windows.prepared(kernel, *over_pixels, window, **windows.counts(counts))


def _gathered(input: Tensor, taps: Tensor, window: Window) -> Tensor:
    return torch.empty_like(taps, dtype=input.dtype)


@binding.library_op(
    "max_pool_gather(Tensor input, Tensor taps, int[] window) -> Tensor", fake=_gathered
)
def _max_pool_gather(input: Tensor, taps: Tensor, window: Window) -> Tensor:
    y = _gathered(input, taps, window)
    _plan_gather(Layout.of(input), Layout.of(y), tuple(window))(y, input, taps, y)
    return y


@launch.planned
def _plan_gather(input: Layout, y: Layout, window: Window) -> launch.Prepared:
    size = y.shape[2:]
    extents, *spacing = windows.split(window)
    return windows.prepared(
        kernels.max_pool2d_gather_kernel if len(size) == 2 else kernels3d.max_pool3d_gather_kernel,
        (*input.shape[1:], *size),
        y.shape[0] * math.prod(size),
        (input, y),
        [number for numbers in spacing for number in numbers],
        **_adaptive(window, input.shape[2:], size),
        **windows.named("R S", extents[1:]),
    )


class MaxPool(torch.autograd.Function):
    """Keeps the tap of each output, the place of the maximum in its window, mostly in one byte."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, window: Window, size: Sequence[int], return_indices: bool
    ) -> tuple[Tensor, Tensor]:
        keep_taps = ctx.needs_input_grad[0]
        output, taps, indices = _max_pool_forward(input, window, size, keep_taps, return_indices)
        if keep_taps:
            _save(ctx, input, taps, window)
            ctx.mark_non_differentiable(indices)
            # zeros for the gradient of the indices would take as much memory as these
            ctx.set_materialize_grads(False)
        return output, indices

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, _: None
    ) -> tuple[Tensor | None, None, None, None]:
        grad_input = None if grad_output is None else _scatter(ctx, grad_output)
        return grad_input, None, None, None


class MaxPoolBackward(torch.autograd.Function):
    """Adds the gradient of each output to the pixel that was its maximum."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        taps: Tensor,
        window: Window,
        shape: Sequence[int],
        channels_last: bool,
    ) -> Tensor:
        ctx.save_for_backward(taps)
        ctx.window = window
        grad_input: Tensor = _max_pool_backward(grad_output, taps, window, shape, channels_last)
        return grad_input

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (taps,) = ctx.saved_tensors
        return binding.apply(MaxPoolGather, grad, taps, ctx.window), None, None, None, None


class MaxPoolGather(torch.autograd.Function):
    """Reads the pixels that were the maxima: the transpose of `MaxPoolBackward`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, taps: Tensor, window: Window) -> Tensor:
        _save(ctx, input, taps, window)
        output: Tensor = _max_pool_gather(input, taps, window)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        return _scatter(ctx, grad_output), None, None


def _save(ctx: Any, input: Tensor, taps: Tensor, window: Window) -> None:
    ctx.save_for_backward(taps)
    ctx.window = window
    ctx.shape = input.shape
    ctx.channels_last = is_channels_last(input)


def _scatter(ctx: Any, grad_output: Tensor) -> Tensor:
    (taps,) = ctx.saved_tensors
    grad_input: Tensor = binding.apply(
        MaxPoolBackward, grad_output, taps, ctx.window, ctx.shape, ctx.channels_last
    )
    return grad_input


def max_pool(
    input: Tensor, window: Window, size: Sequence[int], return_indices: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """Max pooling by the kernels, of images or volumes, batched or not; arguments are checked."""
    batched = input.dim() == len(size) + 2
    outputs: tuple[Tensor, Tensor]
    outputs = binding.apply(
        MaxPool, input if batched else input[None], window, size, return_indices
    )
    values, indices = outputs
    if not batched:
        values = values[0]
    if not return_indices:
        return values
    return values, indices if batched else indices[0]
