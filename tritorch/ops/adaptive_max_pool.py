"""Adaptive max pooling: maxima over as many windows as the output has pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import backend, checks
from tritorch.ops import max_pool_function, windows
from tritorch.ops.max_pool import widened_reference
from tritorch.ops.windows import Counts
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register
from tritorch.repeats.decorator import repeated


def adaptive_max_pool2d_reference(
    input: Tensor, output_size: Counts, return_indices: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The largest value of each window; gradients are added up in float32 at least."""
    return widened_reference(F.adaptive_max_pool2d, input, (output_size,), return_indices)


@repeated
def adaptive_max_pool2d(
    input: Tensor, output_size: Counts, return_indices: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The largest value of each of P x Q windows that cover the image.

    The windows are those of `adaptive_avg_pool2d`, ties and NaN go as in `max_pool2d`.

    Args:
        input: (N, C, H, W) or (C, H, W), any strides; float32, float16, bfloat16 or float64 for the
            kernels.
        output_size: P and Q, or one number for both; None keeps the input's size.
        return_indices: whether to return where the values were.

    Returns:
        (N, C, P, Q) or (C, P, Q) in the input's dtype and memory format.  With `return_indices` a
        tuple of that and of int64 indices, laid out alike, into the H * W pixels of a channel.

    Raises:
        RuntimeError: an `output_size` of other than one number or two, or a negative one, an input
            of other dimensions or with a size of 0 other than the first.
        TypeError: `input` is not a tensor, `output_size` no integers.

    Source: `torch.nn.functional.adaptive_max_pool2d`.
    """
    op = "adaptive_max_pool2d"
    checks.tensor(op, input=input)
    size = windows.adaptive_size(op, input, output_size, 2)
    declined = "an output without pixels" if 0 in size else None
    if not backend.runs_triton(op, input, declined=declined):
        return adaptive_max_pool2d_reference(input, output_size, return_indices)
    window = windows.adaptive(input.shape[-2:], size)
    return max_pool_function.max_pool(input, window, size, bool(return_indices))


def _samples(make: Maker) -> Iterator[Sample]:
    yield Sample("overlap", input=make(2, 5, 9, 7), output_size=(4, 3), layouts=True)
    ties = make(2, 3, 7, 8).round()
    yield Sample("ties", input=ties, output_size=(3, 5), return_indices=True)
    images = make(2, 17, 6, 5).to(memory_format=torch.channels_last)
    yield Sample("even", input=images, output_size=(2, 1), return_indices=True)
    # 272 taps do not fit into a byte
    yield Sample("global", input=make(1, 2, 17, 16), output_size=1, return_indices=True)
    yield Sample("larger", input=make(1, 2, 3, 4), output_size=(5, 9), return_indices=True)
    nothing = torch.full_like(make(1, 2, 5, 7), float("-inf"))
    yield Sample("minus-infinity", input=nothing, output_size=3, return_indices=True)
    kept: Any = (None, 3)
    yield Sample("unbatched", input=make(3, 7, 5), output_size=kept, return_indices=True)
    yield Sample("empty", input=make(0, 3, 5, 5), output_size=2)
    yield Sample("tiny", input=make(1, 1, 3, 4), output_size=(2, 3), gradcheck=True)


def _workloads(make: Maker) -> Iterator[Sample]:
    images = make.empty(32, 512, 13, 13)
    yield Sample("overlap", input=images, output_size=7)
    channels_last = images.to(memory_format=torch.channels_last)
    yield Sample("overlap-channels-last", input=channels_last, output_size=7)


def _rejects(make: Maker) -> Iterator[Reject]:
    x = make(2, 3, 5, 4)
    shape = r"adaptive_max_pool2d: input must be \(N, C, H, W\)"
    several = "output_size must be one integer or 2 of them"
    yield Reject("too-many", several, input=x, output_size=(1, 2, 3))
    yield Reject("negative", "output_size must not be negative", input=x, output_size=-1)
    yield Reject("nothing", "output_size must be integers", input=x, output_size=None)
    yield Reject("no-channels", shape, input=make(2, 0, 5, 4), output_size=2)
    yield Reject("matrix", shape, input=make(5, 4), output_size=2)


def _cost(input: Tensor, output_size: Any, return_indices: bool = False) -> dict[str, Cost]:
    size = windows.adaptive_size("adaptive_max_pool2d", input, output_size, 2)
    outputs = math.prod(input.shape[:-2]) * math.prod(size)
    taps = math.prod(windows.adaptive(input.shape[-2:], size)[:2])
    # a value and its tap
    pooled = outputs * (input.element_size() + (1 if taps <= 256 else 4))
    pixels = input.numel() * input.element_size()
    return {
        "forward": Cost(input.numel(), pixels + pooled + 8 * outputs * return_indices),
        "backward": Cost(outputs, pixels + pooled),
    }


register(
    OpSpec(
        name="adaptive_max_pool2d",
        op=adaptive_max_pool2d,
        reference=adaptive_max_pool2d_reference,
        kernels=(
            "pool.max_pool2d_forward_kernel",
            "pool.max_pool2d_backward_kernel",
            "pool.max_pool2d_backward_loop_kernel",
            "pool.max_pool2d_gather_kernel",
        ),
        gradients=("input",),
        samples=_samples,
        workloads=_workloads,
        rejects=_rejects,
        cost=_cost,
        accuracy="exact",
        source="torch.nn.functional.adaptive_max_pool2d",
        layers=("AdaptiveMaxPool2d",),
    )
)
