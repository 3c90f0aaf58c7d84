"""Average pooling of images: reference, public function, declaration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import backend, checks
from tritorch.ops import avg_pool_function, windows
from tritorch.ops.windows import Ints
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register
from tritorch.repeats.decorator import repeated


def avg_pool2d_reference(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The sum of each window over its number of pixels, or over `divisor_override`."""
    given: Any = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    output: Tensor = F.avg_pool2d(input, *given)
    return output


@repeated
def avg_pool2d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The mean of each window of each channel.

    Sums are kept in float32 (float64 for float64) and rounded once.  A window that reaches beyond
    the padding (`ceil_mode`) counts no pixel there.

    Args:
        input: (N, C, H, W) or (C, H, W), any strides; float32, float16, bfloat16 or float64 for the
            kernels, other dtypes take the reference path.
        kernel_size: height and width of a window in pixels; here and below, one number stands for
            both.
        stride: pixels from one window to the next; None for `kernel_size`.
        padding: zeros added on every side, in pixels, at most half of `kernel_size`.
        ceil_mode: whether a last window may reach beyond the padding, if it starts inside the image
            or the padding before it.
        count_include_pad: whether the mean counts the zeros of the padding.
        divisor_override: what every sum is divided by instead of its number of pixels.

    Returns:
        (N, C, P, Q) or (C, P, Q) in the input's dtype and memory format.

    Raises:
        IndexError: an input of less than three dimensions.
        RuntimeError: an argument that is not one number or two or is out of range, an input of
            other dimensions or with a size of 0 other than N, an output without a pixel.
        TypeError: `input` is not a tensor.

    Source: `torch.nn.functional.avg_pool2d`.
    """
    op = "avg_pool2d"
    checks.tensor(op, input=input)
    if input.dim() < 3:
        checks.fail(IndexError, op, "input must be (N, C, H, W) or (C, H, W)", input=input)
    if type(count_include_pad) is not bool:
        checks.flag(op, "count_include_pad", count_include_pad)
    if divisor_override is not None:
        divisor_override = windows.divisor(op, divisor_override)
    window, size = windows.check(op, input, kernel_size, stride, padding, 1, ceil_mode)
    if not backend.runs_triton(op, input):
        return avg_pool2d_reference(
            input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        )
    return avg_pool_function.avg_pool(input, window, size, count_include_pad, divisor_override)


def _samples(make: Maker) -> Iterator[Sample]:
    three: dict[str, Any] = {"kernel_size": 3, "stride": 2, "padding": 1}
    yield Sample("2x2", input=make(2, 3, 8, 6), kernel_size=2)
    yield Sample("overlap", input=make(2, 5, 13, 11), **three, layouts=True)
    yield Sample("ceil", input=make(2, 3, 8, 7), **three, ceil_mode=True)
    yield Sample(
        "ceil-valid", input=make(2, 3, 8, 7), **three, ceil_mode=True, count_include_pad=False
    )
    yield Sample("valid", input=make(1, 3, 7, 9), **three, count_include_pad=False)
    yield Sample("divisor", input=make(1, 2, 7, 9), **three, divisor_override=-3)
    yield Sample("gaps", input=make(1, 2, 11, 10), kernel_size=2, stride=3, ceil_mode=True)
    # a last window would start in the padding behind the image
    yield Sample(
        "ceil-gaps", input=make(1, 2, 5, 6), kernel_size=2, stride=3, padding=1, ceil_mode=True
    )
    yield Sample(
        "asymmetric", input=make(2, 3, 9, 12), kernel_size=(3, 2), stride=(1, 3), padding=(1, 0)
    )
    yield Sample("large", input=make(1, 2, 20, 19), kernel_size=(17, 16), stride=2, padding=(8, 0))
    yield Sample("global", input=make(3, 5, 6, 5), kernel_size=(6, 5))
    yield Sample("one", input=make(1, 1, 1, 1), kernel_size=1)
    yield Sample("unbatched", input=make(3, 7, 6), kernel_size=2)
    yield Sample("empty", input=make(0, 3, 5, 5), kernel_size=2)
    images = make(2, 17, 5, 6).to(memory_format=torch.channels_last)
    yield Sample("channels-last", input=images, **three)
    yield Sample("channels", input=images.repeat(1, 4, 1, 1), kernel_size=2, stride=1)
    yield Sample("tiny", input=make(1, 1, 3, 4), kernel_size=2, stride=1, gradcheck=True)
    yield Sample(
        "tiny-valid",
        input=make(1, 1, 4, 3),
        **three,
        ceil_mode=True,
        count_include_pad=False,
        gradcheck=True,
    )


def _workloads(make: Maker) -> Iterator[Sample]:
    def images(*shape: int) -> Tensor:
        return make.empty(*shape).to(memory_format=torch.channels_last)

    yield Sample("densenet121-1", input=make.empty(64, 128, 56, 56), kernel_size=2)
    yield Sample("densenet121-1-channels-last", input=images(64, 128, 56, 56), kernel_size=2)
    three: dict[str, Any] = {"kernel_size": 3, "stride": 1, "padding": 1}
    yield Sample("inception-5b", input=images(32, 192, 35, 35), **three)
    yield Sample("inception-5b-contiguous", input=make.empty(32, 192, 35, 35), **three)
    yield Sample("resnet50-global", input=images(64, 2048, 7, 7), kernel_size=7)
    yield Sample("odd", input=images(17, 33, 57, 55), kernel_size=3, count_include_pad=False)
    given: dict[str, Any] = {"kernel_size": 2, "divisor_override": 3}
    yield Sample("divisor", input=images(64, 128, 56, 56), **given)
    yield Sample("divisor-contiguous", input=make.empty(64, 128, 56, 56), **given)


def _rejects(make: Maker) -> Iterator[Reject]:
    x = make(1, 2, 5, 5)
    shape = r"avg_pool2d: input must be \(N, C, H, W\) or \(C, H, W\)"
    padding = r"avg_pool2d: padding must be from 0 to half of kernel_size"
    yield Reject(
        "divisor-zero", r"divisor_override must", input=x, kernel_size=2, divisor_override=0
    )
    yield Reject("kernel-of-three", r"kernel_size must be one", input=x, kernel_size=(1, 1, 1))
    yield Reject("kernel-zero", r"kernel_size must be positive", input=x, kernel_size=0)
    yield Reject("stride-zero", r"stride must be positive", input=x, kernel_size=2, stride=(0, 1))
    yield Reject("padding-negative", padding, input=x, kernel_size=3, padding=-1)
    yield Reject("padding-above-half", padding, input=x, kernel_size=3, padding=2)
    yield Reject("no-window", r"avg_pool2d: no window fits", input=x, kernel_size=6)
    yield Reject("matrix", shape + r".*\(5, 5\)", input=make(5, 5), kernel_size=2)
    yield Reject("volume", shape, input=make(1, 1, 3, 5, 5), kernel_size=2)
    yield Reject("no-channels", shape, input=make(2, 0, 5, 5), kernel_size=2)


def _cost(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> dict[str, Cost]:
    window, size = windows.check("avg_pool2d", input, kernel_size, stride, padding, 1, ceil_mode)
    outputs = math.prod(input.shape[:-2]) * math.prod(size)
    cost = Cost(outputs * window[0] * window[1], (input.numel() + outputs) * input.element_size())
    return {"forward": cost, "backward": cost}


register(
    OpSpec(
        name="avg_pool2d",
        op=avg_pool2d,
        reference=avg_pool2d_reference,
        kernels=(
            "pool.avg_pool2d_forward_kernel",
            "pool.avg_pool2d_backward_kernel",
            "pool_rows.avg_pool_rows_forward_kernel",
            "pool_rows.pool_rows_backward_kernel",
        ),
        gradients=("input",),
        samples=_samples,
        workloads=_workloads,
        rejects=_rejects,
        cost=_cost,
        # linear, but a mean of integers is not exact
        accuracy="composite",
        source="torch.nn.functional.avg_pool2d",
        layers=("AvgPool2d",),
    )
)
