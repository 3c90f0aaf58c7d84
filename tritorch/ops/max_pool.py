"""Max pooling of images: reference, public function, declaration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import backend, checks
from tritorch.ops import max_pool_function, windows
from tritorch.ops.windows import Ints
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register
from tritorch.repeats.decorator import repeated


def max_pool2d_reference(
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
    return widened_reference(F.max_pool2d, input, given, return_indices)


def widened_reference(
    function: Any, input: Tensor, given: tuple[Any, ...], return_indices: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """torch's own maxima, whose CPU kernels round every addition of 16-bit gradients.

    Its CUDA kernels do not.
    """
    widens = input.requires_grad and input.dtype in (torch.float16, torch.bfloat16)
    x = input.float() if widens else input
    if return_indices:
        values, indices = function(x, *given, return_indices=True)
        return values.to(input.dtype), indices
    output: Tensor = function(x, *given)
    return output.to(input.dtype)


@repeated
def max_pool2d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The largest value of each window of each channel.

    The first of equal values in row-major order wins, and the last NaN wins over everything;
    padding is -infinity and never chosen.  Gradients of windows that share a maximum are added in
    the order of the outputs, in float32 (float64 for float64), and rounded once.

    Args:
        input: (N, C, H, W) or (C, H, W), any strides; float32, float16, bfloat16 or float64 for the
            kernels, integer dtypes take the reference path.
        kernel_size: height and width of a window in pixels; here and below, one number stands for
            both.
        stride: pixels from one window to the next; None for `kernel_size`.
        padding: pixels added on every side, at most half of `kernel_size`.
        dilation: pixels from one tap of a window to the next.
        ceil_mode: whether a last window may reach beyond the padding, if it starts inside the image
            or the padding before it.
        return_indices: whether to return where the values were.

    Returns:
        (N, C, P, Q) or (C, P, Q) in the input's dtype and memory format.  With `return_indices` a
        tuple of that and of int64 indices, laid out alike, into the H * W pixels of a channel.

    Raises:
        RuntimeError: an argument that is not one number or two or is out of range, an input of
            other dimensions or with a size of 0 other than N, an output without a pixel.
        TypeError: `input` is not a tensor.

    Source: `torch.nn.functional.max_pool2d`.
    """
    op = "max_pool2d"
    checks.tensor(op, input=input)
    window, size = windows.check(op, input, kernel_size, stride, padding, dilation, ceil_mode)
    if not backend.runs_triton(op, input):
        return max_pool2d_reference(
            input, kernel_size, stride, padding, dilation, ceil_mode, return_indices
        )
    return max_pool_function.max_pool(input, window, size, bool(return_indices))


def _samples(make: Maker) -> Iterator[Sample]:
    three: dict[str, Any] = {"kernel_size": 3, "padding": 1}
    yield Sample("2x2", input=make(2, 3, 8, 6), kernel_size=2)
    yield Sample("overlap", input=make(2, 5, 13, 11), stride=2, **three, layouts=True)
    yield Sample("stride-1", input=make(2, 2, 7, 9), stride=1, **three)
    yield Sample("dilation", input=make(1, 3, 11, 10), stride=2, dilation=2, **three)
    yield Sample("dilation-loop", input=make(1, 2, 9, 8), stride=1, dilation=2, **three)
    yield Sample("ceil", input=make(2, 3, 8, 7), stride=2, ceil_mode=True, **three)
    yield Sample("gaps", input=make(1, 2, 11, 10), kernel_size=2, stride=3, ceil_mode=True)
    # a last window would start in the padding after the image
    yield Sample(
        "ceil-gaps", input=make(1, 2, 5, 6), kernel_size=2, stride=3, padding=1, ceil_mode=True
    )
    # a window ends where a pixel would be the next one's, and its first column is its largest
    falling = make(1, 2, 7, 25).sort(-1, descending=True).values
    yield Sample("wide", input=falling, kernel_size=(3, 17), stride=2)
    yield Sample(
        "asymmetric",
        input=make(2, 3, 9, 12),
        kernel_size=(3, 2),
        stride=(1, 3),
        padding=(1, 0),
        dilation=(2, 1),
    )
    # 272 taps do not fit into a byte
    yield Sample("large", input=make(1, 2, 20, 19), kernel_size=(17, 16), stride=2, padding=(8, 0))
    yield Sample("global", input=make(3, 5, 6, 5), kernel_size=(6, 5))
    yield Sample("one", input=make(1, 1, 1, 1), kernel_size=1)
    yield Sample("ties", input=make(2, 3, 9, 8).round(), stride=2, **three, return_indices=True)
    yield Sample("indices", input=make(2, 3, 7, 8), stride=2, **three, return_indices=True)
    yield Sample("unbatched", input=make(3, 7, 6), kernel_size=2, return_indices=True)
    nothing = torch.full_like(make(2, 3, 5, 6), float("-inf"))
    yield Sample("minus-infinity", input=nothing, stride=1, **three, return_indices=True)
    yield Sample("empty", input=make(0, 3, 5, 5), kernel_size=2)
    images = make(2, 17, 5, 6).to(memory_format=torch.channels_last)
    yield Sample("channels-last", input=images, stride=2, **three, return_indices=True)
    yield Sample("channels", input=images.repeat(1, 4, 1, 1), kernel_size=2, stride=1)
    yield Sample("tiny", input=make(1, 1, 3, 4), kernel_size=2, stride=1, gradcheck=True)
    yield Sample(
        "tiny-loop", input=make(1, 1, 12, 1), kernel_size=(10, 1), stride=1, gradcheck=True
    )


def _workloads(make: Maker) -> Iterator[Sample]:
    def images(*shape: int) -> Tensor:
        return make.empty(*shape).to(memory_format=torch.channels_last)

    three: dict[str, Any] = {"kernel_size": 3, "padding": 1}
    yield Sample("resnet50-stem", input=make.empty(32, 64, 112, 112), stride=2, **three)
    yield Sample("resnet50-stem-channels-last", input=images(32, 64, 112, 112), stride=2, **three)
    yield Sample("vgg16-1", input=make.empty(64, 64, 224, 224), kernel_size=2)
    yield Sample("vgg16-1-channels-last", input=images(64, 64, 224, 224), kernel_size=2)
    yield Sample("inception-3a", input=images(32, 192, 28, 28), stride=1, **three)
    yield Sample("pyramid", input=images(16, 512, 13, 13), kernel_size=5, stride=1, padding=2)
    yield Sample("odd", input=make.empty(17, 33, 57, 55), stride=2, ceil_mode=True, **three)
    yield Sample("odd-channels-last", input=images(17, 33, 57, 55), stride=2, **three)


def _rejects(make: Maker) -> Iterator[Reject]:
    x = make(1, 2, 5, 5)
    padding = r"max_pool2d: padding must be from 0 to half of kernel_size"
    shape = r"max_pool2d: input must be \(N, C, H, W\) or \(C, H, W\)"
    for name in ("kernel_size", "stride", "padding", "dilation"):
        for kind, rule, value in (
            ("of-three", "must be one integer or 2 of them", (1, 1, 1)),
            ("negative", "must be", (-1, 1)),
            ("zero", "must be positive", (0, 1)),
        ):
            if (name, kind) == ("padding", "zero"):
                continue
            given: dict[str, Any] = {"kernel_size": 2, name: value}
            yield Reject(
                f"{name}-{kind}", rf"max_pool2d: {name} {rule}.*\(.*, 1\)", input=x, **given
            )
    yield Reject("padding-above-half", padding, input=x, kernel_size=3, padding=2)
    yield Reject("padding-dilated", padding, input=x, kernel_size=3, padding=2, dilation=2)
    yield Reject("no-window", r"max_pool2d: no window fits.*5, 5\)", input=x, kernel_size=6)
    yield Reject("no-dilated", r"max_pool2d: no window fits", input=x, kernel_size=3, dilation=3)
    yield Reject("matrix", shape + r".*\(5, 5\)", input=make(5, 5), kernel_size=2)
    yield Reject("volume", shape, input=make(1, 1, 3, 5, 5), kernel_size=2)
    yield Reject("no-channels", shape, input=make(2, 0, 5, 5), kernel_size=2)
    yield Reject("no-rows", shape, input=make(2, 3, 0, 5), kernel_size=2)


def _cost(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> dict[str, Cost]:
    window, size = windows.check(
        "max_pool2d", input, kernel_size, stride, padding, dilation, ceil_mode
    )
    outputs = math.prod(input.shape[:-2]) * math.prod(size)
    taps = window[0] * window[1]
    # a value and its tap
    pooled = outputs * (input.element_size() + (1 if taps <= 256 else 4))
    pixels = input.numel() * input.element_size()
    return {
        "forward": Cost(outputs * (taps - 1), pixels + pooled + 8 * outputs * return_indices),
        "backward": Cost(outputs, pixels + pooled),
    }


register(
    OpSpec(
        name="max_pool2d",
        op=max_pool2d,
        reference=max_pool2d_reference,
        kernels=(
            "pool.max_pool2d_forward_kernel",
            "pool.max_pool2d_backward_kernel",
            "pool.max_pool2d_backward_loop_kernel",
            "pool.max_pool2d_gather_kernel",
            "pool_rows.max_pool_rows_forward_kernel",
            "pool_rows.pool_rows_backward_kernel",
        ),
        gradients=("input",),
        samples=_samples,
        workloads=_workloads,
        rejects=_rejects,
        cost=_cost,
        # gradients too: the order of their sums is part of the definition
        accuracy="exact",
        source="torch.nn.functional.max_pool2d",
        layers=("MaxPool2d",),
    )
)
