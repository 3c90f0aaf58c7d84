"""Max and average pooling of sequences, which are images of one row: no copy and no kernel more."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tritorch import backend, checks
from tritorch.ops import avg_pool_function, max_pool_function, windows
from tritorch.ops.max_pool import widened_reference
from tritorch.ops.windows import Ints, Window
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register
from tritorch.repeats.decorator import repeated


def max_pool1d_reference(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The largest value of each window; gradients are added up in float32 at least."""
    given = (kernel_size, stride, padding, dilation, ceil_mode)
    return widened_reference(F.max_pool1d, input, given, return_indices)


def avg_pool1d_reference(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """The sum of each window over its number of pixels."""
    given: Any = (kernel_size, stride, padding, ceil_mode, count_include_pad)
    output: Tensor = F.avg_pool1d(input, *given)
    return output


def _of_a_row(window: Window) -> Window:
    """The same window over images of one row."""
    k, stride, padding, dilation = window
    return 1, k, 1, stride, 0, padding, 1, dilation


@repeated
def max_pool1d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The largest value of each window of each channel: `max_pool2d` along one axis.

    Args:
        input: (N, C, L) or (C, L), any strides; float32, float16, bfloat16 or float64 for the
            kernels.
        kernel_size: length of a window in pixels.
        stride: pixels from one window to the next; None for `kernel_size`.
        padding: pixels added at both ends, at most half of `kernel_size`.
        dilation: pixels from one tap of a window to the next.
        ceil_mode: whether a last window may reach beyond the padding, if it starts inside the
            sequence or the padding before it.
        return_indices: whether to return where the values were.

    Returns:
        (N, C, P) or (C, P) in the input's dtype and order of strides.  With `return_indices` a
        tuple of that and of int64 indices, laid out alike, into the L pixels of a channel.

    Raises:
        RuntimeError: an argument that is not one number or is out of range, an input of other
            dimensions or with a size of 0 other than N, an output without a pixel.
        TypeError: `input` is not a tensor.

    Source: `torch.nn.functional.max_pool1d`.
    """
    op = "max_pool1d"
    checks.tensor(op, input=input)
    window, (p,) = windows.check(op, input, kernel_size, stride, padding, dilation, ceil_mode, 1)
    if not backend.runs_triton(op, input):
        return max_pool1d_reference(
            input, kernel_size, stride, padding, dilation, ceil_mode, return_indices
        )
    rows = input.unsqueeze(-2)
    outputs = max_pool_function.max_pool(rows, _of_a_row(window), (1, p), bool(return_indices))
    if isinstance(outputs, Tensor):
        return outputs.squeeze(-2)
    values, indices = outputs
    return values.squeeze(-2), indices.squeeze(-2)


@repeated
def avg_pool1d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """The mean of each window of each channel: `avg_pool2d` along one axis.

    Args:
        input: (N, C, L) or (C, L), any strides; float32, float16, bfloat16 or float64 for the
            kernels, other dtypes take the reference path.
        kernel_size: length of a window in pixels.
        stride: pixels from one window to the next; None for `kernel_size`.
        padding: zeros added at both ends, in pixels, at most half of `kernel_size`.
        ceil_mode: whether a last window may reach beyond the padding, if it starts inside the
            sequence or the padding before it.
        count_include_pad: whether the mean counts the zeros of the padding.

    Returns:
        (N, C, P) or (C, P) in the input's dtype and order of strides.

    Raises:
        RuntimeError: an argument that is not one number or is out of range, an input of other
            dimensions or with a size of 0 other than N, an output without a pixel.
        TypeError: `input` is not a tensor.

    Source: `torch.nn.functional.avg_pool1d`.
    """
    op = "avg_pool1d"
    checks.tensor(op, input=input)
    if type(count_include_pad) is not bool:
        checks.flag(op, "count_include_pad", count_include_pad)
    window, (p,) = windows.check(op, input, kernel_size, stride, padding, 1, ceil_mode, 1)
    if not backend.runs_triton(op, input):
        return avg_pool1d_reference(
            input, kernel_size, stride, padding, ceil_mode, count_include_pad
        )
    rows = input.unsqueeze(-2)
    output = avg_pool_function.avg_pool(rows, _of_a_row(window), (1, p), count_include_pad)
    return output.squeeze(-2)


def _max_samples(make: Maker) -> Iterator[Sample]:
    overlap: dict[str, Any] = {"kernel_size": 3, "stride": 2, "padding": 1}
    yield Sample("overlap", input=make(2, 5, 13), **overlap, layouts=True)
    yield Sample(
        "dilation",
        input=make(2, 3, 14).round(),
        **overlap,
        dilation=2,
        ceil_mode=True,
        return_indices=True,
    )
    # more windows at a pixel than one unrolled program takes
    yield Sample("long", input=make(2, 3, 20), kernel_size=10, stride=1)
    yield Sample("unbatched", input=make(3, 9), kernel_size=(2,), return_indices=True)
    yield Sample("empty", input=make(0, 3, 5), kernel_size=2)
    yield Sample("tiny", input=make(1, 2, 5), kernel_size=2, stride=1, gradcheck=True)


def _avg_samples(make: Maker) -> Iterator[Sample]:
    overlap: dict[str, Any] = {"kernel_size": 3, "stride": 2, "padding": 1}
    yield Sample("overlap", input=make(2, 5, 13), **overlap, layouts=True)
    yield Sample("ceil", input=make(2, 3, 14), **overlap, ceil_mode=True)
    yield Sample("valid", input=make(2, 3, 14), **overlap, ceil_mode=True, count_include_pad=False)
    yield Sample("unbatched", input=make(3, 9), kernel_size=(2,))
    yield Sample("empty", input=make(0, 3, 5), kernel_size=2)
    yield Sample("tiny", input=make(1, 2, 5), kernel_size=2, stride=1, gradcheck=True)


def _workloads(make: Maker) -> Iterator[Sample]:
    yield Sample("m5-1", input=make.empty(128, 128, 2000), kernel_size=4)


def _rejects(op: str) -> Any:
    def rejects(make: Maker) -> Iterator[Reject]:
        x = make(2, 3, 5)
        shape = rf"{op}: input must be \(N, C, L\) or \(C, L\)"
        padding = f"{op}: padding must be from 0 to half"
        yield Reject("kernel-of-two", "kernel_size must be one", input=x, kernel_size=(2, 2))
        yield Reject("kernel-zero", "kernel_size must be positive", input=x, kernel_size=0)
        yield Reject("stride-zero", "stride must be positive", input=x, kernel_size=2, stride=0)
        yield Reject("padding", padding, input=x, kernel_size=3, padding=2)
        yield Reject("no-window", f"{op}: no window fits", input=x, kernel_size=6)
        yield Reject("vector", shape + r".*\(5,\)", input=make(5), kernel_size=2)
        yield Reject("images", shape, input=make(1, 2, 3, 5), kernel_size=2)
        yield Reject("no-channels", shape, input=make(2, 0, 5), kernel_size=2)

    return rejects


def _max_cost(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> dict[str, Cost]:
    window, (p,) = windows.check(
        "max_pool1d", input, kernel_size, stride, padding, dilation, ceil_mode, 1
    )
    outputs = math.prod(input.shape[:-1]) * p
    # a value and its tap
    pooled = outputs * (input.element_size() + (1 if window[0] <= 256 else 4))
    pixels = input.numel() * input.element_size()
    return {
        "forward": Cost(outputs * (window[0] - 1), pixels + pooled + 8 * outputs * return_indices),
        "backward": Cost(outputs, pixels + pooled),
    }


def _avg_cost(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> dict[str, Cost]:
    window, (p,) = windows.check("avg_pool1d", input, kernel_size, stride, padding, 1, ceil_mode, 1)
    outputs = math.prod(input.shape[:-1]) * p
    cost = Cost(outputs * window[0], (input.numel() + outputs) * input.element_size())
    return {"forward": cost, "backward": cost}


register(
    OpSpec(
        name="max_pool1d",
        op=max_pool1d,
        reference=max_pool1d_reference,
        kernels=(
            "pool.max_pool2d_forward_kernel",
            "pool.max_pool2d_backward_kernel",
            "pool.max_pool2d_backward_loop_kernel",
            "pool.max_pool2d_gather_kernel",
            "pool_rows.max_pool_rows_forward_kernel",
            "pool_rows.pool_rows_backward_kernel",
        ),
        gradients=("input",),
        samples=_max_samples,
        workloads=_workloads,
        rejects=_rejects("max_pool1d"),
        cost=_max_cost,
        accuracy="exact",
        source="torch.nn.functional.max_pool1d",
        layers=("MaxPool1d",),
    )
)

register(
    OpSpec(
        name="avg_pool1d",
        op=avg_pool1d,
        reference=avg_pool1d_reference,
        kernels=(
            "pool.avg_pool2d_forward_kernel",
            "pool.avg_pool2d_backward_kernel",
            "pool_rows.avg_pool_rows_forward_kernel",
            "pool_rows.pool_rows_backward_kernel",
        ),
        gradients=("input",),
        samples=_avg_samples,
        workloads=_workloads,
        rejects=_rejects("avg_pool1d"),
        cost=_avg_cost,
        # linear, but a mean of integers is not exact
        accuracy="composite",
        source="torch.nn.functional.avg_pool1d",
        layers=("AvgPool1d",),
    )
)
