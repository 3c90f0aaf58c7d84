"""Max and average pooling of volumes: references, public functions, declarations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import backend, binding, checks
from tritorch.ops import avg_pool_function, max_pool_function, windows
from tritorch.ops.geometry import is_channels_last
from tritorch.ops.max_pool import widened_reference
from tritorch.ops.windows import Ints
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register
from tritorch.repeats.decorator import repeated


def max_pool3d_reference(
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
    return widened_reference(F.max_pool3d, input, given, return_indices)


def avg_pool3d_reference(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The sum of each window over its number of pixels, in the input's memory format."""
    given: Any = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)

    def average(x: Tensor) -> Tensor:
        # torch's CPU kernels do not take 16-bit numbers
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        output: Tensor = F.avg_pool3d(wide, *given)
        return output.to(x.dtype)

    return in_format_of(input, average)


def in_format_of(input: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function(input)`, whose result and gradient are channels_last_3d where the input is.

    torch's means of volumes are contiguous in any case.
    """
    if input.dim() != 5 or not is_channels_last(input):
        return function(input)
    memory_format = torch.channels_last_3d
    x = input.view_as(input)
    if x.requires_grad:
        x.register_hook(lambda grad: grad.contiguous(memory_format=memory_format))
    return function(x).contiguous(memory_format=memory_format)


def in_autocast_of_cpu(input: Tensor) -> Tensor:
    """The input in float32 under autocast of the CPU, which widens volumes where that of a GPU
    keeps their dtype.
    """
    if input.device.type != "cpu":
        return input
    widened: Tensor = binding.autocast_to_float32(input)[0]
    return widened


@repeated
def max_pool3d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The largest value of each window of each channel: `max_pool2d` along three axes.

    Args:
        input: (N, C, D, H, W) or (C, D, H, W), any strides; float32, float16, bfloat16 or float64
            for the kernels, integer dtypes take the reference path.
        kernel_size: depth, height and width of a window in pixels; here and below, one number
            stands for all.
        stride: pixels from one window to the next; None for `kernel_size`.
        padding: pixels added on every side, at most half of `kernel_size`.
        dilation: pixels from one tap of a window to the next.
        ceil_mode: whether a last window may reach beyond the padding, if it starts inside the
            volume or the padding before it.
        return_indices: whether to return where the values were.

    Returns:
        (N, C, Z, P, Q) or (C, Z, P, Q) in the input's dtype (float32 under autocast of the CPU) and
        memory format.  With `return_indices` a tuple of that and of int64 indices, laid out alike,
        into the D * H * W pixels of a channel.

    Raises:
        RuntimeError: an argument that is not one number or three or is out of range, an input of
            other dimensions or with a size of 0 other than N, an output without a pixel.
        TypeError: `input` is not a tensor.

    Source: `torch.nn.functional.max_pool3d`.
    """
    op = "max_pool3d"
    checks.tensor(op, input=input)
    window, size = windows.check(op, input, kernel_size, stride, padding, dilation, ceil_mode, 3)
    input = in_autocast_of_cpu(input)
    if not backend.runs_triton(op, input):
        return max_pool3d_reference(
            input, kernel_size, stride, padding, dilation, ceil_mode, return_indices
        )
    return max_pool_function.max_pool(input, window, size, bool(return_indices))


@repeated
def avg_pool3d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The mean of each window of each channel: `avg_pool2d` along three axes.

    Args:
        input: (N, C, D, H, W) or (C, D, H, W), any strides; float32, float16, bfloat16 or float64
            for the kernels, other dtypes take the reference path.
        kernel_size: depth, height and width of a window in pixels; here and below, one number
            stands for all.
        stride: pixels from one window to the next; None for `kernel_size`.
        padding: zeros added on every side, in pixels, at most half of `kernel_size`.
        ceil_mode: whether a last window may reach beyond the padding, if it starts inside the
            volume or the padding before it.
        count_include_pad: whether the mean counts the zeros of the padding.
        divisor_override: what every sum is divided by instead of its number of pixels.

    Returns:
        (N, C, Z, P, Q) or (C, Z, P, Q) in the input's dtype (float32 under autocast of the CPU) and
        memory format, which torch loses.

    Raises:
        RuntimeError: an argument that is not one number or three or is out of range, an input of
            other dimensions, with a size of 0 other than N or smaller than `kernel_size`.
        TypeError: `input` is not a tensor.

    Source: `torch.nn.functional.avg_pool3d`.
    """
    op = "avg_pool3d"
    checks.tensor(op, input=input)
    if type(count_include_pad) is not bool:
        checks.flag(op, "count_include_pad", count_include_pad)
    if divisor_override is not None:
        divisor_override = windows.divisor(op, divisor_override)
    window, size = windows.check(op, input, kernel_size, stride, padding, 1, ceil_mode, 3)
    # of volumes alone torch asks this, whatever the padding
    if any(k > pixels for k, pixels in zip(window[:3], input.shape[-3:], strict=True)):
        rule = "input must not be smaller than kernel_size"
        checks.fail(RuntimeError, op, rule, input=input, kernel_size=window[:3])
    input = in_autocast_of_cpu(input)
    if not backend.runs_triton(op, input):
        return avg_pool3d_reference(
            input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        )
    return avg_pool_function.avg_pool(input, window, size, count_include_pad, divisor_override)


_OVERLAP: dict[str, Any] = {"kernel_size": 3, "stride": 2, "padding": 1}


def _max_samples(make: Maker) -> Iterator[Sample]:
    yield Sample("overlap", input=make(2, 3, 5, 4, 7), **_OVERLAP, layouts=True)
    yield Sample(
        "asymmetric",
        input=make(1, 2, 6, 7, 8).round(),
        kernel_size=(2, 3, 1),
        stride=(1, 2, 3),
        padding=(1, 0, 0),
        dilation=(2, 1, 1),
        ceil_mode=True,
        return_indices=True,
    )
    # 294 taps do not fit into a byte
    yield Sample("large", input=make(1, 1, 7, 6, 7), kernel_size=(6, 7, 7), padding=(0, 3, 0))
    volumes = make(2, 17, 2, 3, 4).to(memory_format=torch.channels_last_3d)
    yield Sample("channels-last", input=volumes, kernel_size=2, stride=1, return_indices=True)
    nothing = torch.full_like(make(1, 2, 3, 4, 3), float("-inf"))
    yield Sample("minus-infinity", input=nothing, **_OVERLAP, return_indices=True)
    yield Sample("unbatched", input=make(2, 4, 5, 3), kernel_size=2, return_indices=True)
    yield Sample("empty", input=make(0, 3, 2, 3, 2), kernel_size=2)
    # the maxima are last in their windows, in slice, row and column
    rising = make(12).sort().values.view(1, 1, 2, 3, 2)
    yield Sample("tiny", input=rising, kernel_size=2, stride=1, gradcheck=True)


def _avg_samples(make: Maker) -> Iterator[Sample]:
    yield Sample("overlap", input=make(2, 3, 5, 4, 7), **_OVERLAP, layouts=True)
    yield Sample(
        "ceil-valid",
        input=make(1, 2, 6, 4, 7),
        **_OVERLAP,
        ceil_mode=True,
        count_include_pad=False,
    )
    yield Sample("ceil", input=make(1, 2, 6, 4, 7), **_OVERLAP, ceil_mode=True)
    yield Sample(
        "divisor",
        input=make(1, 2, 6, 4, 7),
        kernel_size=(1, 2, 3),
        stride=(2, 1, 3),
        divisor_override=-3,
    )
    volumes = make(2, 17, 2, 3, 4).to(memory_format=torch.channels_last_3d)
    yield Sample("channels-last", input=volumes, kernel_size=2, stride=1)
    yield Sample("unbatched", input=make(2, 4, 5, 3), kernel_size=2)
    yield Sample("empty", input=make(0, 3, 2, 3, 2), kernel_size=2)
    yield Sample("tiny", input=make(1, 1, 2, 3, 2), kernel_size=2, stride=1, gradcheck=True)


def _workloads(make: Maker) -> Iterator[Sample]:
    yield Sample("c3d-1", input=make.empty(8, 64, 16, 112, 112), kernel_size=2)
    # not by .to(), which would copy
    channels_last = make.empty(8, 16, 112, 112, 64).permute(0, 4, 1, 2, 3)
    yield Sample("i3d-stem", input=channels_last, **_OVERLAP)


def _avg_workloads(make: Maker) -> Iterator[Sample]:
    yield from _workloads(make)
    volumes = make.empty(8, 64, 16, 112, 112)
    yield Sample("divisor", input=volumes, kernel_size=2, divisor_override=3)


def _rejects(op: str) -> Callable[[Maker], Iterator[Reject]]:
    def rejects(make: Maker) -> Iterator[Reject]:
        x = make(2, 3, 5, 4, 6)
        shape = rf"{op}: input must be \(N, C, D, H, W\) or \(C, D, H, W\)"
        padding = f"{op}: padding must be from 0 to half"
        yield Reject("kernel-of-two", "kernel_size must be one", input=x, kernel_size=(2, 2))
        yield Reject("kernel-zero", "kernel_size must be positive", input=x, kernel_size=0)
        yield Reject("stride-zero", "stride must be positive", input=x, kernel_size=2, stride=0)
        yield Reject("padding", padding, input=x, kernel_size=3, padding=2)
        yield Reject("no-window", f"{op}: no window fits", input=x, kernel_size=5)
        yield Reject("images", shape, input=make(3, 5, 4), kernel_size=2)
        yield Reject("no-channels", shape, input=make(2, 0, 5, 4, 6), kernel_size=2)
        if op == "avg_pool3d":
            rule = "divisor_override must not be 0"
            yield Reject("divisor-zero", rule, input=x, kernel_size=2, divisor_override=0)
            rule = r"input must not be smaller than kernel_size.*kernel_size \(3, 5, 3\)"
            yield Reject("small", rule, input=x, kernel_size=(3, 5, 3), padding=1)

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
    window, size = windows.check(
        "max_pool3d", input, kernel_size, stride, padding, dilation, ceil_mode, 3
    )
    outputs = math.prod(input.shape[:-3]) * math.prod(size)
    taps = math.prod(window[:3])
    # a value and its tap
    pooled = outputs * (input.element_size() + (1 if taps <= 256 else 4))
    pixels = input.numel() * input.element_size()
    return {
        "forward": Cost(outputs * (taps - 1), pixels + pooled + 8 * outputs * return_indices),
        "backward": Cost(outputs, pixels + pooled),
    }


def _avg_cost(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> dict[str, Cost]:
    window, size = windows.check("avg_pool3d", input, kernel_size, stride, padding, 1, ceil_mode, 3)
    outputs = math.prod(input.shape[:-3]) * math.prod(size)
    flops = outputs * math.prod(window[:3])
    cost = Cost(flops, (input.numel() + outputs) * input.element_size())
    return {"forward": cost, "backward": cost}


register(
    OpSpec(
        name="max_pool3d",
        op=max_pool3d,
        reference=max_pool3d_reference,
        kernels=(
            "pool3d.max_pool3d_forward_kernel",
            "pool3d.max_pool3d_backward_kernel",
            "pool3d.max_pool3d_gather_kernel",
            "pool_rows.max_pool_rows_forward_kernel",
            "pool_rows.pool_rows_backward_kernel",
        ),
        gradients=("input",),
        samples=_max_samples,
        workloads=_workloads,
        rejects=_rejects("max_pool3d"),
        cost=_max_cost,
        # gradients too: the order of their sums is part of the definition
        accuracy="exact",
        source="torch.nn.functional.max_pool3d",
        layers=("MaxPool3d",),
    )
)

register(
    OpSpec(
        name="avg_pool3d",
        op=avg_pool3d,
        reference=avg_pool3d_reference,
        kernels=(
            "pool3d.avg_pool3d_forward_kernel",
            "pool3d.avg_pool3d_backward_kernel",
            "pool_rows.avg_pool_rows_forward_kernel",
            "pool_rows.pool_rows_backward_kernel",
        ),
        gradients=("input",),
        samples=_avg_samples,
        workloads=_avg_workloads,
        rejects=_rejects("avg_pool3d"),
        cost=_avg_cost,
        # linear, but a mean of integers is not exact
        accuracy="composite",
        source="torch.nn.functional.avg_pool3d",
        layers=("AvgPool3d",),
    )
)
