"""Adaptive average pooling: means over as many windows as the output has pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import backend, binding, checks, launch
from tritorch.ops import avg_pool_function, windows
from tritorch.ops.geometry import is_channels_last
from tritorch.ops.pool3d import in_autocast_of_cpu, in_format_of
from tritorch.ops.spatial_mean import SpatialMean
from tritorch.ops.strided import Layout
from tritorch.ops.windows import Counts, Ints
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register
from tritorch.repeats.decorator import repeated

kernels = launch.kernels("adaptive_pool")


def adaptive_avg_pool1d_reference(input: Tensor, output_size: Ints) -> Tensor:
    """The mean of each window."""
    given: Any = output_size
    return F.adaptive_avg_pool1d(input, given)


def adaptive_avg_pool2d_reference(input: Tensor, output_size: Counts) -> Tensor:
    """The mean of each window."""
    given: Any = output_size
    return F.adaptive_avg_pool2d(input, given)


def adaptive_avg_pool3d_reference(input: Tensor, output_size: Counts) -> Tensor:
    """The mean of each window, in the input's memory format."""
    given: Any = output_size
    return in_format_of(input, lambda x: F.adaptive_avg_pool3d(x, given))


def _pooled(input: Tensor, size: Sequence[int], channels_last: bool, gradient: bool) -> Tensor:
    return windows.empty(input, (*input.shape[:2], *size), channels_last, input.dtype)


@binding.library_op(
    "adaptive_avg_pool(Tensor input, SymInt[] size, bool channels_last, bool gradient) -> Tensor",
    fake=_pooled,
)
def _adaptive_avg_pool(
    input: Tensor, size: Sequence[int], channels_last: bool, gradient: bool
) -> Tensor:
    output = _pooled(input, size, channels_last, gradient)
    _plan(Layout.of(input), Layout.of(output), gradient)(output, input, output)
    return output


@launch.planned
def _plan(input: Layout, output: Layout, gradient: bool) -> launch.Prepared:
    volumes = [_as_volume(layout) for layout in (input, output)]
    (n, c, *read), (_, _, *written) = (volume.shape for volume in volumes)
    return windows.prepared(
        kernels.adaptive_avg_pool_kernel,
        (c, *read, *written),
        n * math.prod(written),
        volumes,
        tuple(map(windows.largest, read, written)),
        wide=windows.multiplies_beyond_int32(read, written),
        flat=len(input.shape) == 4,
        GRADIENT=gradient,
    )


def _as_volume(layout: Layout) -> Layout:
    """An image is a volume of one slice."""
    if len(layout.shape) == 5:
        return layout
    (n, c, *size), (along_n, along_c, *along) = layout.shape, layout.strides
    return Layout((n, c, 1, *size), (along_n, along_c, 0, *along), layout.itemsize)


class AdaptiveAvgPool(torch.autograd.Function):
    """Linear in its input; with `gradient` it is the transpose, which reads outputs."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, size: Sequence[int], channels_last: bool, gradient: bool
    ) -> Tensor:
        ctx.size, ctx.channels_last = input.shape[2:], is_channels_last(input)
        ctx.gradient = gradient
        output: Tensor = _adaptive_avg_pool(input, size, channels_last, gradient)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        grad_input = binding.apply(
            AdaptiveAvgPool, grad_output, ctx.size, ctx.channels_last, not ctx.gradient
        )
        return grad_input, None, None, None


def _mean(input: Tensor, size: Sequence[int]) -> Tensor:
    """The kernels' means of images or volumes, batched or not, whose arguments are checked."""
    batched = input.dim() == len(size) + 2
    images = input if batched else input[None]
    pixels = images.shape[2:]
    output: Tensor
    if max(size) == 1:
        output = binding.apply(SpatialMean, images)
    elif windows.divide(pixels, size):
        output = avg_pool_function.avg_pool(images, windows.adaptive(pixels, size), size)
    else:
        channels_last = is_channels_last(images)
        output = binding.apply(AdaptiveAvgPool, images, size, channels_last, False)
    return output if batched else output[0]


def _declined(input: Tensor, size: Sequence[int]) -> str | None:
    if 0 in size:
        return "an output without pixels"
    if 0 in input.shape[-len(size) :]:
        return "images without pixels"
    if input.dim() not in (len(size) + 1, len(size) + 2):
        return f"{input.dim()} dimensions"
    return None


@repeated
def adaptive_avg_pool1d(input: Tensor, output_size: Ints) -> Tensor:
    """The mean of each of `output_size` windows: `adaptive_avg_pool2d` along one axis.

    Args:
        input: (N, C, L) or (C, L), any strides; float32, float16, bfloat16 or float64 for the
            kernels.
        output_size: windows along a sequence.

    Returns:
        (N, C, output_size) or (C, output_size) in the input's dtype and order of strides.

    Raises:
        RuntimeError: an `output_size` that is several numbers or negative, an input of other
            dimensions, or of length 0 where `output_size` is not 1.
        TypeError: `input` is not a tensor, `output_size` not a number.

    Source: `torch.nn.functional.adaptive_avg_pool1d`.
    """
    op = "adaptive_avg_pool1d"
    checks.tensor(op, input=input)
    size = windows.adaptive_size(op, input, output_size, 1, channels=False, averages=True)
    if not backend.runs_triton(op, input, declined=_declined(input, size)):
        return adaptive_avg_pool1d_reference(input, output_size)
    return _mean(input.unsqueeze(-2), (1, *size)).squeeze(-2)


@repeated
def adaptive_avg_pool2d(input: Tensor, output_size: Counts) -> Tensor:
    """The mean of each of P x Q windows that cover the image.

    Window i along H begins at floor(i * H / P) and ends before ceil((i + 1) * H / P): they overlap
    where P does not divide H.  Sums are kept in float32 (float64 for float64) and rounded once.
    The gradient of a global mean is written out, as torch's.

    Args:
        input: (N, C, H, W) or (C, H, W), any strides; float32, float16, bfloat16 or float64 for the
            kernels.
        output_size: P and Q, or one number for both; None keeps the input's size.

    Returns:
        (N, C, P, Q) or (C, P, Q) in the input's dtype and memory format.

    Raises:
        IndexError: an input without two dimensions for an `output_size` of 1.
        RuntimeError: an `output_size` of other than one number or two, or a negative one; where it
            is not 1, which is torch's mean of the last two dimensions whatever stands before them,
            an input of other dimensions or with an image of size 0.
        TypeError: `input` is not a tensor, `output_size` no integers.
        ValueError: more sizes than dimensions before the last.

    Source: `torch.nn.functional.adaptive_avg_pool2d`.
    """
    op = "adaptive_avg_pool2d"
    checks.tensor(op, input=input)
    size = windows.adaptive_size(op, input, output_size, 2, channels=False, averages=True)
    if not backend.runs_triton(op, input, declined=_declined(input, size)):
        return adaptive_avg_pool2d_reference(input, output_size)
    return _mean(input, size)


@repeated
def adaptive_avg_pool3d(input: Tensor, output_size: Counts) -> Tensor:
    """The mean of each of Z x P x Q windows that cover the volume: as `adaptive_avg_pool2d`.

    Args:
        input: (N, C, D, H, W) or (C, D, H, W), any strides; float32, float16, bfloat16 or float64
            for the kernels.
        output_size: Z, P and Q, or one number for all; None keeps the input's size.

    Returns:
        (N, C, Z, P, Q) or (C, Z, P, Q) in the input's dtype (float32 under autocast of the CPU) and
        memory format, which torch loses.

    Raises:
        IndexError: an input without three dimensions for an `output_size` of 1.
        RuntimeError: an `output_size` of other than one number or three, or a negative one; where
            it is not 1, an input of other dimensions or with a size of 0 other than the first.
        TypeError: `input` is not a tensor, `output_size` no integers.
        ValueError: more sizes than dimensions before the last.

    Source: `torch.nn.functional.adaptive_avg_pool3d`.
    """
    op = "adaptive_avg_pool3d"
    checks.tensor(op, input=input)
    size = windows.adaptive_size(op, input, output_size, 3, averages=True)
    input = in_autocast_of_cpu(input)
    if not backend.runs_triton(op, input, declined=_declined(input, size)):
        return adaptive_avg_pool3d_reference(input, output_size)
    return _mean(input, size)


def _samples1d(make: Maker) -> Iterator[Sample]:
    yield Sample("overlap", input=make(2, 5, 13), output_size=4, layouts=True)
    yield Sample("global", input=make(2, 3, 9), output_size=(1,))
    yield Sample("global-long", input=make(1, 2, 300), output_size=1)
    yield Sample("global-splits", input=make(1, 3, 4160), output_size=1)
    yield Sample("even", input=make(2, 3, 8), output_size=4)
    yield Sample("even-of-three", input=make(2, 3, 9), output_size=3)
    yield Sample("unbatched", input=make(3, 9), output_size=2)
    yield Sample("empty", input=make(0, 3, 5), output_size=2)
    yield Sample("tiny", input=make(1, 2, 5), output_size=3, gradcheck=True)


def _samples2d(make: Maker) -> Iterator[Sample]:
    yield Sample("overlap", input=make(2, 5, 9, 7), output_size=(4, 3), layouts=True)
    yield Sample("global", input=make(3, 5, 7, 7), output_size=1)
    images = make(2, 17, 6, 5).to(memory_format=torch.channels_last)
    yield Sample("global-channels-last", input=images, output_size=1)
    # 5 tiles of pixels each, of which a program adds some
    yield Sample("global-splits", input=make(1, 3, 64, 65), output_size=(1, 1))
    yield Sample("even", input=images, output_size=(2, 5))
    yield Sample("larger", input=make(1, 2, 3, 4), output_size=(5, 9))
    kept: Any = (None, 3)
    yield Sample("kept", input=make(2, 3, 5, 8), output_size=kept)
    yield Sample("unbatched", input=make(3, 7, 5), output_size=(2, 1))
    yield Sample("empty", input=make(0, 3, 5, 5), output_size=1)
    yield Sample("tiny", input=make(1, 1, 3, 4), output_size=(2, 3), gradcheck=True)
    yield Sample("tiny-global", input=make(1, 2, 2, 3), output_size=1, gradcheck=True)


def _samples3d(make: Maker) -> Iterator[Sample]:
    yield Sample("overlap", input=make(2, 3, 5, 4, 7), output_size=(2, 3, 4), layouts=True)
    volumes = make(2, 5, 3, 4, 2).to(memory_format=torch.channels_last_3d)
    yield Sample("global", input=volumes, output_size=1)
    yield Sample("global-splits", input=make(1, 3, 16, 13, 20), output_size=1)
    kept: Any = (None, 2, 1)
    yield Sample("even", input=volumes, output_size=kept)
    yield Sample("unbatched", input=make(3, 4, 3, 5), output_size=2)
    yield Sample("empty", input=make(0, 3, 2, 2, 2), output_size=1)
    yield Sample("tiny", input=make(1, 1, 3, 2, 2), output_size=(2, 1, 2), gradcheck=True)


def _workloads1d(make: Maker) -> Iterator[Sample]:
    yield Sample("speech", input=make.empty(32, 512, 249), output_size=1)


def _workloads2d(make: Maker) -> Iterator[Sample]:
    images = make.empty(64, 2048, 7, 7)
    yield Sample("resnet50", input=images, output_size=1)
    images = images.to(memory_format=torch.channels_last)
    yield Sample("resnet50-channels-last", input=images, output_size=1)
    yield Sample("squeeze-excite", input=make.empty(32, 96, 112, 112), output_size=1)
    images = make.empty(32, 512, 13, 13).to(memory_format=torch.channels_last)
    yield Sample("vgg16-of-416", input=images, output_size=7)


def _workloads3d(make: Maker) -> Iterator[Sample]:
    yield Sample("r3d18", input=make.empty(16, 512, 2, 7, 7), output_size=1)
    yield Sample("c3d", input=make.empty(8, 256, 9, 15, 15), output_size=(4, 7, 7))


def _rejects(op: str, axes: int) -> Callable[[Maker], Iterator[Reject]]:
    def rejects(make: Maker) -> Iterator[Reject]:
        pixels = (5, 4, 3)[:axes]
        x = make(2, 3, *pixels)
        shape = rf"{op}: input must be \(N, C, "
        several = f"{op}: output_size must be one integer or {axes} of them"
        yield Reject("too-many", several, input=x, output_size=(2,) * (axes + 1))
        yield Reject("negative", f"{op}: output_size must not be neg", input=x, output_size=-1)
        yield Reject("nothing", f"{op}: output_size must be", input=x, output_size=None)
        yield Reject("no-pixels", shape, input=make(2, 3, 0, *pixels[1:]), output_size=2)
        yield Reject("few-axes", shape, input=make(*pixels), output_size=2)
        yield Reject("many-axes", shape, input=make(1, 2, 3, *pixels), output_size=2)

    return rejects


def _cost(axes: int) -> Callable[..., dict[str, Cost]]:
    def cost(input: Tensor, output_size: Any) -> dict[str, Cost]:
        size = windows.adaptive_size("adaptive_avg_pool", input, output_size, axes, channels=False)
        outputs = math.prod(input.shape[:-axes]) * math.prod(size)
        forward = Cost(input.numel(), (input.numel() + outputs) * input.element_size())
        return {"forward": forward, "backward": forward}

    return cost


_MEAN = (
    "adaptive_pool.spatial_mean_kernel",
    "adaptive_pool.small_mean_kernel",
    "adaptive_pool.spread_mean_kernel",
    "adaptive_pool.adaptive_avg_pool_kernel",
)
_EVEN2D = ("pool.avg_pool2d_forward_kernel", "pool.avg_pool2d_backward_kernel")

register(
    OpSpec(
        name="adaptive_avg_pool1d",
        op=adaptive_avg_pool1d,
        reference=adaptive_avg_pool1d_reference,
        kernels=(
            *_MEAN,
            "reduce.split_sum_kernel",
            *_EVEN2D,
            "pool_rows.avg_pool_rows_forward_kernel",
            "pool_rows.pool_rows_backward_kernel",
        ),
        gradients=("input",),
        samples=_samples1d,
        workloads=_workloads1d,
        rejects=_rejects("adaptive_avg_pool1d", 1),
        cost=_cost(1),
        # linear, but a mean of integers is not exact
        accuracy="composite",
        source="torch.nn.functional.adaptive_avg_pool1d",
        layers=("AdaptiveAvgPool1d",),
    )
)

register(
    OpSpec(
        name="adaptive_avg_pool2d",
        op=adaptive_avg_pool2d,
        reference=adaptive_avg_pool2d_reference,
        kernels=(*_MEAN, "reduce.split_sum_kernel", *_EVEN2D),
        gradients=("input",),
        samples=_samples2d,
        workloads=_workloads2d,
        rejects=_rejects("adaptive_avg_pool2d", 2),
        cost=_cost(2),
        accuracy="composite",
        source="torch.nn.functional.adaptive_avg_pool2d",
        layers=("AdaptiveAvgPool2d",),
    )
)

register(
    OpSpec(
        name="adaptive_avg_pool3d",
        op=adaptive_avg_pool3d,
        reference=adaptive_avg_pool3d_reference,
        kernels=(
            *_MEAN,
            "reduce.split_sum_kernel",
            "pool3d.avg_pool3d_forward_kernel",
            "pool3d.avg_pool3d_backward_kernel",
        ),
        gradients=("input",),
        samples=_samples3d,
        workloads=_workloads3d,
        rejects=_rejects("adaptive_avg_pool3d", 3),
        cost=_cost(3),
        accuracy="composite",
        source="torch.nn.functional.adaptive_avg_pool3d",
        layers=("AdaptiveAvgPool3d",),
    )
)
