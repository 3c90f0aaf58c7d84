"""Convolution of images: reference, launches, gradients, public function, declaration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import backend, binding, checks, launch
from tritorch.ops import depthwise, implicit_gemm
from tritorch.ops.geometry import Geometry, is_channels_last, memory_format
from tritorch.ops.reduce import ChannelSum
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register

kernels = launch.kernels("conv")

Pair = int | Sequence[int]

# what one launch may count in int32: pixels, and weights
_MAX_INDEX = 2**30


def conv2d_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """Cross-correlation of images with filters."""
    if padding == "same" and weight.dim() == 4:
        dilations = checks.ints("conv2d", "dilation", dilation, 2)
        (top, bottom), (left, right) = _same_padding(weight.shape[2:], dilations)
        if (top, left) != (bottom, right) and checks.ints("conv2d", "stride", stride, 2) == (1, 1):
            # the copy that torch would make, without its warning
            input, padding = F.pad(input, (left, right, top, bottom)), 0
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _same_padding(kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """Before and after each axis: an odd row or column of zeros goes to the bottom and the right."""
    totals = [d * (size - 1) for d, size in zip(dilation, kernel, strict=True)]
    return [(total // 2, total - total // 2) for total in totals]


def _output(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return torch.empty(
        (input.shape[0], weight.shape[0], *output_size),
        dtype=input.dtype,
        device=input.device,
        memory_format=memory_format(is_channels_last(input) or is_channels_last(weight)),
    )


def _flops(
    input: Sequence[int], weight: Sequence[int], bias: Any, output_size: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    return 2 * input[0] * math.prod(output_size) * math.prod(weight)


@binding.library_op(
    "conv2d(Tensor input, Tensor weight, Tensor? bias, SymInt[2] output_size, int[2] stride, "
    "int[2] padding, int[2] dilation, int groups) -> Tensor",
    fake=_output,
    flops=_flops,
)
def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    y = _output(input, weight, bias, output_size, stride, padding, dilation, groups)
    geometry = _geometry(stride, padding, dilation, groups)
    _convolve(weight, groups)(input, weight, bias, y, geometry, False)
    return y


def _grad_input(
    grad_output: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    return torch.empty(
        (grad_output.shape[0], weight.shape[1] * groups, *input_size),
        dtype=weight.dtype,
        device=weight.device,
        memory_format=memory_format(channels_last),
    )


def _grad_input_flops(
    grad_output: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    return 2 * grad_output[0] * math.prod(grad_output[2:]) * math.prod(weight)


@binding.library_op(
    "conv2d_grad_input(Tensor grad_output, Tensor weight, SymInt[2] input_size, int[2] stride, "
    "int[2] padding, int[2] dilation, int groups, bool channels_last) -> Tensor",
    fake=_grad_input,
    flops=_grad_input_flops,
)
def _conv2d_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    grad_input = _grad_input(
        grad_output, weight, input_size, stride, padding, dilation, groups, channels_last
    )
    geometry = _geometry(stride, padding, dilation, groups)
    _convolve(weight, groups)(grad_output, weight, None, grad_input, geometry, True)
    return grad_input


def _convolve(weight: Tensor, groups: int) -> Callable[..., None]:
    return depthwise.convolve if depthwise.takes(weight, groups) else implicit_gemm.convolve


def _geometry(
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Geometry:
    pairs = ((first, second) for first, second in (stride, padding, dilation))
    return Geometry(*pairs, groups)


def _grad_weight(
    grad_output: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    return torch.empty(
        (grad_output.shape[1], input.shape[1] // groups, *kernel_size),
        dtype=input.dtype,
        device=input.device,
        memory_format=memory_format(channels_last),
    )


def _grad_weight_flops(
    grad_output: Sequence[int],
    input: Sequence[int],
    kernel_size: Sequence[int],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    *args: Any,
    **kwargs: Any,
) -> int:
    return 2 * math.prod(grad_output) * input[1] // groups * math.prod(kernel_size)


@binding.library_op(
    "conv2d_grad_weight(Tensor grad_output, Tensor input, SymInt[2] kernel_size, int[2] stride, "
    "int[2] padding, int[2] dilation, int groups, bool channels_last) -> Tensor",
    fake=_grad_weight,
    flops=_grad_weight_flops,
)
def _conv2d_grad_weight(
    grad_output: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    grad_weight = _grad_weight(
        grad_output, input, kernel_size, stride, padding, dilation, groups, channels_last
    )
    geometry = _geometry(stride, padding, dilation, groups)
    if depthwise.takes(grad_weight, groups):
        partial = depthwise.grad_weight(grad_output, input, grad_weight, geometry)
    else:
        partial = implicit_gemm.grad_weight(grad_output, input, grad_weight, geometry)
    if partial is None:
        return grad_weight
    splits, _, r, s, inputs = partial.shape
    launch.run(
        kernels.conv2d_sum_weight_kernel,
        (math.ceil(grad_weight.numel() / kernels.BLOCK),),
        partial,
        grad_weight,
        grad_weight.numel(),
        splits,
        r,
        s,
        inputs,
        *grad_weight.stride(),
        on=grad_weight,
        BLOCK=kernels.BLOCK,
    )
    return grad_weight


class Conv2d(torch.autograd.Function):
    """A convolution is linear in the image and in the filter: its gradients and theirs are the three ops here."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(
            input if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None
        )
        ctx.geometry = stride, padding, dilation, groups
        ctx.input_size, ctx.input_format = input.shape[2:], is_channels_last(input)
        ctx.kernel_size, ctx.weight_format = weight.shape[2:], is_channels_last(weight)
        return _conv2d(input, weight, bias, output_size, *ctx.geometry)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = binding.apply(
                Conv2dGradInput, grad_output, weight, ctx.input_size, *ctx.geometry, ctx.input_format
            )
        if ctx.needs_input_grad[1]:
            grad_weight = binding.apply(
                Conv2dGradWeight, grad_output, input, ctx.kernel_size, *ctx.geometry, ctx.weight_format
            )
        if ctx.needs_input_grad[2]:
            grad_bias = binding.apply(ChannelSum, grad_output, 1)
        return grad_input, grad_weight, grad_bias, None, None, None, None, None


class Conv2dGradInput(torch.autograd.Function):
    """The transposed convolution."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        weight: Tensor,
        input_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        channels_last: bool,
    ) -> Tensor:
        ctx.save_for_backward(
            grad_output if ctx.needs_input_grad[1] else None,
            weight if ctx.needs_input_grad[0] else None,
        )
        ctx.geometry = stride, padding, dilation, groups
        ctx.output_size = grad_output.shape[2:]
        ctx.kernel_size, ctx.weight_format = weight.shape[2:], is_channels_last(weight)
        return _conv2d_grad_input(grad_output, weight, input_size, *ctx.geometry, channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, weight = ctx.saved_tensors
        grad_grad_output = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_grad_output = binding.apply(
                Conv2d, grad, weight, None, ctx.output_size, *ctx.geometry
            )
        if ctx.needs_input_grad[1]:
            grad_weight = binding.apply(
                Conv2dGradWeight, grad_output, grad, ctx.kernel_size, *ctx.geometry, ctx.weight_format
            )
        return grad_grad_output, grad_weight, None, None, None, None, None, None


class Conv2dGradWeight(torch.autograd.Function):
    """The correlation of an image with a gradient of the output, over all pixels."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        input: Tensor,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        channels_last: bool,
    ) -> Tensor:
        ctx.save_for_backward(
            grad_output if ctx.needs_input_grad[1] else None,
            input if ctx.needs_input_grad[0] else None,
        )
        ctx.geometry = stride, padding, dilation, groups
        ctx.output_size = grad_output.shape[2:]
        ctx.input_size, ctx.input_format = input.shape[2:], is_channels_last(input)
        return _conv2d_grad_weight(grad_output, input, kernel_size, *ctx.geometry, channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, input = ctx.saved_tensors
        grad_grad_output = grad_input = None
        if ctx.needs_input_grad[0]:
            grad_grad_output = binding.apply(
                Conv2d, input, grad, None, ctx.output_size, *ctx.geometry
            )
        if ctx.needs_input_grad[1]:
            grad_input = binding.apply(
                Conv2dGradInput, grad_output, grad, ctx.input_size, *ctx.geometry, ctx.input_format
            )
        return grad_grad_output, grad_input, None, None, None, None, None, None


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """Cross-correlation of images with filters, one number of which stands for both axes of the image.

    Args:
        input: (N, C, H, W) or (C, H, W), any strides; fastest as channels_last.
        weight: (K, C / groups, R, S), the same dtype and device.
        bias: (K,) or None.
        stride: pixels between the filter's positions.
        padding: zeros on each side, or "valid" for none, or "same" for an output of the input's size, which takes
            a stride of 1; an odd number of zeros has the last one at the bottom or the right.
        dilation: pixels between the filter's taps.
        groups: output channels of group g see the input channels of group g alone; C groups make it depthwise.

    Returns:
        (N, K, P, Q) or (K, P, Q), with P = (H + padding - dilation * (R - 1) - 1) // stride + 1 and Q likewise;
        channels_last if the input or the weight is.  Sums are kept in float32 (float64 for float64); float32
        products use TF32 where `torch.backends.cudnn` allows it.  A gradient has the memory format of its tensor.
        The zeros of the padding are multiplied: an infinite weight gives NaN there, and so it does for output
        gradients beyond the border, where the gradient of the input takes them for zeros.

    Raises:
        RuntimeError: sizes, channels or groups that do not match, a filter larger than the padded image, stride,
            dilation or groups that are not positive, negative or unknown padding, "same" with another stride,
            different dtypes or devices.
        TypeError: `input` or `weight` is not a tensor.

    Source: `torch.nn.functional.conv2d`.
    """
    checks.tensor("conv2d", input=input, weight=weight)
    strides = checks.ints("conv2d", "stride", stride, 2)
    dilations = checks.ints("conv2d", "dilation", dilation, 2)
    _check_shapes(input, weight, bias, groups)
    sides = _check_padding(input, weight, strides, padding, dilations)
    size = tuple(
        (n + sum(side) - d * (k - 1) - 1) // s + 1
        for n, k, side, s, d in zip(
            input.shape[-2:], weight.shape[2:], sides, strides, dilations, strict=True
        )
    )
    if not backend.runs_triton("conv2d", input, weight, bias, declined=_declined(input, weight, size)):
        return conv2d_reference(input, weight, bias, stride, padding, dilation, groups)
    x, w, b = binding.autocast_to_lower(input, weight, bias)
    checks.same_dtype_and_device("conv2d", x, weight=w, bias=b)
    images = x if x.dim() == 4 else x[None]
    first = tuple(side[0] for side in sides)
    output: Tensor = binding.apply(Conv2d, images, w, b, size, strides, first, dilations, groups)
    return output if x.dim() == 4 else output[0]


def _declined(input: Tensor, weight: Tensor, size: tuple[int, ...]) -> str | None:
    if input.shape[-3] == 0:
        return "no channels"
    batch = input.shape[0] if input.dim() == 4 else 1
    pixels = batch * max(math.prod(input.shape[-2:]), math.prod(size))
    if max(pixels, weight.numel()) > _MAX_INDEX:
        return "more than 2**30 pixels or weights"
    return None


def _check_shapes(input: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    if input.dim() not in (3, 4):
        checks.fail(RuntimeError, "conv2d", "input must have 4 dimensions, or 3 unbatched", input=input)
    if weight.dim() != 4 or 0 in (weight.shape[0], *weight.shape[2:]):
        checks.fail(RuntimeError, "conv2d", "weight must have 4 dimensions, none empty", weight=weight)
    if groups <= 0:
        checks.fail(RuntimeError, "conv2d", "groups must be positive", groups=groups)
    if weight.shape[0] % groups:
        checks.fail(
            RuntimeError,
            "conv2d",
            f"{weight.shape[0]} output channels do not divide into groups",
            weight=weight,
            groups=groups,
        )
    if input.shape[-3] != weight.shape[1] * groups:
        checks.fail(
            RuntimeError,
            "conv2d",
            f"weight expects {weight.shape[1] * groups} input channels",
            input=input,
            weight=weight,
            groups=groups,
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        checks.fail(
            RuntimeError,
            "conv2d",
            f"bias must have {weight.shape[0]} elements",
            bias=bias,
            weight=weight,
        )


def _check_padding(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Pair | str,
    dilation: Sequence[int],
) -> list[tuple[int, int]]:
    """Zeros before and after each axis of the image."""
    if min(stride) <= 0 or min(dilation) <= 0:
        checks.fail(
            RuntimeError,
            "conv2d",
            "stride and dilation must be positive",
            stride=stride,
            dilation=dilation,
        )
    if padding == "same":
        if max(stride) > 1:
            checks.fail(RuntimeError, "conv2d", "padding 'same' takes a stride of 1", stride=stride)
        sides = _same_padding(weight.shape[2:], dilation)
    elif isinstance(padding, str):
        if padding != "valid":
            checks.fail(
                RuntimeError,
                "conv2d",
                "padding must be 'same', 'valid' or integers",
                received=padding,
            )
        sides = [(0, 0), (0, 0)]
    else:
        sides = [(n, n) for n in checks.ints("conv2d", "padding", padding, 2)]
        if min(sides) < (0, 0):
            checks.fail(RuntimeError, "conv2d", "padding must not be negative", padding=padding)
    if any(
        n == 0 or n + sum(side) < d * (k - 1) + 1
        for n, k, side, d in zip(input.shape[-2:], weight.shape[2:], sides, dilation, strict=True)
    ):
        checks.fail(
            RuntimeError,
            "conv2d",
            "the filter is larger than the padded image",
            input=input,
            weight=weight,
            padding=padding,
            dilation=dilation,
        )
    return sides


def _samples(make: Maker) -> Iterator[Sample]:
    def sample(
        name: str,
        input: Sequence[int],
        weight: Sequence[int],
        *,
        bias: bool = True,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        layouts: bool = False,
        gradcheck: bool = False,
        channels_last: bool = False,
    ) -> Sample:
        x, w = make(*input), make(*weight)
        if channels_last:
            x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
        return Sample(
            name,
            layouts=layouts,
            gradcheck=gradcheck,
            input=x,
            weight=w,
            bias=make(weight[0]) if bias else None,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )

    yield sample("3x3", (2, 5, 6, 7), (18, 5, 3, 3), padding=1, layouts=True)
    yield sample("1x1", (2, 17, 5, 3), (19, 17, 1, 1))
    yield sample("odd-stride-2", (2, 9, 7, 9), (10, 9, 3, 3), stride=2, padding=1)
    yield sample("stem", (1, 3, 13, 15), (20, 3, 7, 7), bias=False, stride=2, padding=3, channels_last=True)
    yield sample("dilation-2", (1, 6, 9, 8), (7, 6, 3, 3), padding=2, dilation=2)
    yield sample("stride-3-dilation-2", (1, 5, 11, 13), (6, 5, 3, 4), stride=3, padding=2, dilation=2)
    yield sample("stride-4-dilation-6", (1, 5, 14, 9), (4, 5, 2, 1), stride=(4, 2), dilation=(6, 2))
    yield sample(
        "asymmetric", (2, 5, 9, 12), (6, 5, 2, 3), stride=(3, 2), padding=(0, 2), dilation=(2, 1)
    )
    yield sample("groups", (2, 12, 5, 6), (10, 6, 3, 3), padding=1, groups=2)
    yield sample("few-per-group", (1, 6, 5, 6), (9, 2, 3, 3), padding=1, groups=3)
    yield sample("depthwise", (2, 5, 6, 7), (5, 1, 3, 3), padding=1, groups=5)
    yield sample(
        "depthwise-multiplier", (2, 3, 7, 6), (6, 1, 3, 3), stride=2, padding=1, groups=3, channels_last=True
    )
    yield sample("same-even", (2, 5, 5, 6), (6, 5, 4, 2), padding="same")
    yield sample("depthwise-same", (1, 4, 5, 6), (4, 1, 2, 4), padding="same", dilation=(1, 3), groups=4)
    yield sample("valid", (1, 5, 4, 6), (4, 5, 3, 2), padding="valid")
    yield sample("unbatched", (5, 6, 4), (6, 5, 3, 3), padding=1)
    yield sample("empty-batch", (0, 5, 6, 4), (6, 5, 3, 3), padding=1)
    yield sample("empty-batch-depthwise", (0, 5, 6, 4), (5, 1, 3, 3), padding=1, groups=5)
    yield sample("tile-edges", (1, 33, 3, 4), (65, 33, 3, 3), padding=1, channels_last=True)
    yield sample("channel-blocks", (1, 67, 2, 3), (17, 67, 2, 1), padding=(1, 0))
    yield sample("pixel-tiles", (1, 5, 12, 13), (18, 5, 1, 1), channels_last=True)
    yield sample("larger-than-image", (2, 5, 2, 1), (6, 5, 5, 4), padding=(2, 3))
    yield sample("gaps", (1, 5, 8, 9), (4, 5, 2, 1), stride=4)
    yield sample("depthwise-gaps", (1, 5, 8, 9), (5, 1, 2, 1), stride=4, groups=5)
    yield sample("one-pixel", (2, 5, 1, 1), (6, 5, 1, 1))
    yield sample("tiny", (1, 2, 3, 1), (9, 2, 2, 1), stride=2, padding=(1, 0), gradcheck=True)
    yield sample("tiny-depthwise", (1, 2, 2, 2), (2, 1, 2, 1), padding=(1, 0), groups=2, gradcheck=True)


# name, batch, channels in and out, image, kernel, stride, groups
_LAYERS = (
    ("resnet50-stem", 64, 3, 64, 224, 7, 2, 1),
    ("resnet50-s1-3x3", 64, 64, 64, 56, 3, 1, 1),
    ("resnet50-s1-1x1", 64, 64, 256, 56, 1, 1, 1),
    ("resnet50-s2-3x3-stride-2", 64, 128, 128, 56, 3, 2, 1),
    ("resnet50-s3-3x3", 64, 256, 256, 14, 3, 1, 1),
    ("resnet50-s4-3x3", 64, 512, 512, 7, 3, 1, 1),
    ("resnet50-s4-1x1-stride-2", 64, 1024, 2048, 14, 1, 2, 1),
    ("resnet50-s4-3x3-batch-1", 1, 512, 512, 7, 3, 1, 1),
    ("mobilenet-96", 64, 96, 96, 112, 3, 2, 96),
    ("mobilenet-144", 64, 144, 144, 56, 3, 1, 144),
    ("resnext50-32x4d", 64, 128, 128, 56, 3, 1, 32),
    ("resnext50-32x16d", 64, 512, 512, 14, 3, 1, 32),
)


def _workloads(make: Maker) -> Iterator[Sample]:
    for name, n, c, k, size, kernel, stride, groups in _LAYERS:
        x, w = make.empty(n, c, size, size), make.empty(k, c // groups, kernel, kernel)
        settings = {"stride": stride, "padding": kernel // 2, "groups": groups}
        if name in ("resnet50-s2-3x3-stride-2", "mobilenet-144"):
            yield Sample(f"{name}-contiguous", input=x, weight=w, bias=None, **settings)
        x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
        yield Sample(name, input=x, weight=w, bias=None, **settings)


def _rejects(make: Maker) -> Iterator[Reject]:
    x, w = make(2, 4, 8, 8), make(6, 4, 3, 3)
    yield Reject("channels", r"conv2d: weight expects 5 input channels.*\(2, 4, 8, 8\)", input=x, weight=make(6, 5, 3, 3))
    yield Reject("groups-in", r"conv2d: weight expects 6 input channels.*groups 2", input=x, weight=make(6, 3, 3, 3), groups=2)
    yield Reject("groups-out", r"conv2d: 6 output channels do not divide", input=x, weight=make(6, 1, 3, 3), groups=4)
    yield Reject("groups-zero", r"conv2d: groups must be positive.*groups 0", input=x, weight=w, groups=0)
    yield Reject("padding-negative", r"conv2d: padding must not be negative.*-1", input=x, weight=w, padding=(0, -1))
    yield Reject("padding-word", r"conv2d: padding must be 'same'.*'full'", input=x, weight=w, padding="full")
    yield Reject("padding-three", r"conv2d: padding must be one integer or 2", input=x, weight=w, padding=(1, 1, 1))
    yield Reject("same-stride", r"conv2d: padding 'same' takes a stride of 1.*\(2, 1\)", input=x, weight=w, padding="same", stride=(2, 1))
    yield Reject("stride-zero", r"conv2d: stride and dilation must be positive.*\(0, 0\)", input=x, weight=w, stride=0)
    yield Reject("dilation-zero", r"conv2d: stride and dilation must be positive.*\(1, 0\)", input=x, weight=w, dilation=(1, 0))
    yield Reject("kernel", r"conv2d: the filter is larger than the padded image", input=x, weight=make(6, 4, 3, 11), padding=1)
    yield Reject("no-rows", r"conv2d: the filter is larger than the padded image", input=make(2, 4, 0, 8), weight=w, padding=2)
    yield Reject("input-dim", r"conv2d: input must have 4 dimensions", input=make(8, 8), weight=w)
    yield Reject("weight-dim", r"conv2d: weight must have 4 dimensions", input=x, weight=make(6, 4, 3))
    yield Reject("weight-empty", r"conv2d: weight must have 4 dimensions, none empty", input=x, weight=make(0, 4, 3, 3))
    yield Reject("bias", r"conv2d: bias must have 6 elements.*\(5,\)", input=x, weight=w, bias=make(5))
    yield Reject("bias-dim", r"conv2d: bias must have 6 elements.*\(6, 1\)", input=x, weight=w, bias=make(6, 1))
    yield Reject("dtype", r"conv2d: expected weight of the input's dtype|same", input=x, weight=w.double())
    yield Reject("not-a-tensor", r"conv2d: input must be a Tensor, not list", input=[x], weight=w)


def _cost(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> dict[str, Cost]:
    x, w = (torch.empty(t.shape, device="meta") for t in (input, weight))
    y = conv2d_reference(x, w, None, stride, padding, dilation, groups)
    flops = 2 * y.numel() * math.prod(weight.shape[1:])
    traffic = (input.numel() + weight.numel() + y.numel()) * input.element_size()
    return {"forward": Cost(flops, traffic), "backward": Cost(2 * flops, 2 * traffic)}


register(
    OpSpec(
        name="conv2d",
        op=conv2d,
        reference=conv2d_reference,
        kernels=(
            "conv.conv2d_kernel",
            "conv.conv2d_grad_weight_kernel",
            "conv.conv2d_sum_weight_kernel",
            "depthwise.depthwise_conv2d_kernel",
            "depthwise.depthwise_conv2d_grad_weight_kernel",
            "reduce.channel_sum_kernel",
            "reduce.split_sum_kernel",
        ),
        gradients=("input", "weight", "bias"),
        samples=_samples,
        workloads=_workloads,
        rejects=_rejects,
        cost=_cost,
        accuracy="multilinear",
        autocast="lower",
        source="torch.nn.functional.conv2d",
        layers=("Conv2d",),
    )
)
