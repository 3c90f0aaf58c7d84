"""Transposed convolutions, whose forward is the gradient of a convolution's input: references,
public functions, declarations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import repeats
from tritorch.ops import conv_call
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register

Ints = int | Sequence[int]


def conv_transpose1d_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
) -> Tensor:
    """The gradient of conv1d by its input, of a signal for the gradient of the output."""
    return F.conv_transpose1d(
        input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def conv_transpose2d_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
) -> Tensor:
    """The gradient of conv2d by its input, of an image for the gradient of the output."""
    return F.conv_transpose2d(
        input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def conv_transpose3d_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
) -> Tensor:
    """The gradient of conv3d by its input, of a volume for the gradient of the output."""
    return F.conv_transpose3d(
        input, weight, bias, stride, padding, output_padding, groups, dilation
    )


@repeats.repeated
def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
) -> Tensor:
    """Transposed convolution of signals: `conv_transpose2d` on views of one row.

    Args, returns and errors are those of `conv_transpose2d` with one axis; the output is contiguous
    unless the channels of the weight are.

    Source: `torch.nn.functional.conv_transpose1d`.
    """
    return conv_call.transposed(
        1,
        conv_transpose1d_reference,
        input,
        weight,
        bias,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
    )


@repeats.repeated
def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
) -> Tensor:
    """Transposed convolution of images: what `conv2d` makes of its output's gradient, plus a bias.

    One number stands for both axes of the image.

    Args:
        input: (N, C, H, W) or (C, H, W), any strides; fastest as channels_last: 16-bit
            images and those of TF32 in another order are copied to it, and results from it, where
            products outweigh that.
        weight: (C, K / groups, R, S), the same dtype and device; fastest as channels_last:
            from another order each call, and each gradient of the input, may copy it to that one.
        bias: (K,) or None.
        stride: pixels of the output between the places that neighbouring pixels of the input reach.
        padding: pixels cut off each side of the output.
        output_padding: rows and columns more at the bottom and the right, fewer than the stride or
            than the dilation.
        groups: the output channels of a group see the input channels of that group alone.
        dilation: pixels of the output between taps of the filter.

    Returns:
        (N, K, P, Q) or (K, P, Q), P = (H - 1) * stride - 2 * padding + dilation * (R - 1) +
        output_padding + 1 and Q likewise; channels_last if the input or the weight is.  Sums are
        kept in float32 (float64 for float64); float32 products use TF32 where
        `torch.backends.cudnn` allows it.  Gradients have the memory format of their tensors.

    Raises:
        RuntimeError: sizes, channels or groups that do not match, stride, dilation or groups that
            are not positive, a padding that is negative, too large, or for the output as large as
            stride and dilation; different dtypes or devices.
        TypeError: `input` or `weight` is not a tensor, `padding` is a word.

    Source: `torch.nn.functional.conv_transpose2d`.
    """
    return conv_call.transposed(
        2,
        conv_transpose2d_reference,
        input,
        weight,
        bias,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
    )


@repeats.repeated
def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
) -> Tensor:
    """Transposed convolution of volumes.

    Args, returns and errors are those of `conv_transpose2d` with three axes.

    Source: `torch.nn.functional.conv_transpose3d`.
    """
    return conv_call.transposed(
        3,
        conv_transpose3d_reference,
        input,
        weight,
        bias,
        stride,
        padding,
        output_padding,
        groups,
        dilation,
    )


def _sample(
    make: Maker,
    name: str,
    input: tuple[int, ...],
    weight: tuple[int, ...],
    *,
    bias: bool = True,
    channels_last: bool = False,
    layouts: bool = False,
    gradcheck: bool = False,
    **given: Any,
) -> Sample:
    x, w = make(*input), make(*weight)
    if channels_last:
        order = torch.channels_last if len(weight) == 4 else torch.channels_last_3d
        x, w = (t.contiguous(memory_format=order) for t in (x, w))
    steps = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1, **given}
    outputs = weight[1] * steps["groups"]
    return Sample(
        name,
        layouts=layouts,
        gradcheck=gradcheck,
        input=x,
        weight=w,
        bias=make(outputs) if bias else None,
        **steps,
    )


def _samples_1d(make: Maker) -> Iterator[Sample]:
    yield _sample(make, "typical", (2, 5, 9), (5, 6, 4), stride=2, padding=1, layouts=True)
    yield _sample(make, "gaps", (1, 3, 4), (3, 4, 2), stride=3, output_padding=2, bias=False)
    yield _sample(make, "dilation", (2, 4, 5), (4, 3, 3), dilation=3, padding=2, output_padding=2)
    yield _sample(make, "depthwise", (2, 5, 6), (5, 1, 3), stride=2, padding=1, groups=5)
    yield _sample(make, "many-channels", (1, 32, 9), (32, 24, 7), stride=2, padding=2)
    yield _sample(make, "unbatched", (4, 5), (4, 3, 3), padding=(1,))
    yield _sample(make, "empty-batch", (0, 4, 5), (4, 3, 3))
    yield _sample(make, "tiny", (1, 1, 2), (1, 2, 2), stride=2, padding=1, gradcheck=True)


def _samples_2d(make: Maker) -> Iterator[Sample]:
    yield _sample(make, "typical", (2, 5, 4, 5), (5, 6, 3, 3), stride=2, padding=1, layouts=True)
    yield _sample(
        make, "output-padding", (1, 3, 4, 3), (3, 4, 3, 2), stride=(2, 3), output_padding=(1, 2)
    )
    yield _sample(
        make,
        "dilation",
        (1, 5, 3, 4),
        (5, 4, 3, 2),
        stride=(2, 1),
        padding=(1, 2),
        output_padding=(2, 1),
        dilation=(3, 2),
        bias=False,
    )
    yield _sample(make, "gaps", (2, 4, 3, 2), (4, 3, 1, 2), stride=3)
    yield _sample(make, "groups", (2, 6, 4, 3), (6, 2, 3, 3), padding=1, groups=2)
    yield _sample(
        make, "depthwise", (1, 8, 4, 3), (8, 1, 4, 4), stride=2, groups=8, channels_last=True
    )
    yield _sample(make, "channels-last", (1, 16, 3, 4), (16, 8, 2, 2), channels_last=True)
    yield _sample(make, "split-sum", (1, 256, 1, 2), (256, 16, 1, 3), channels_last=True)
    # enough products of 16-bit numbers for copies in channels_last
    yield _sample(make, "many-channels", (1, 16, 3, 4), (16, 24, 3, 4), padding=1)
    yield _sample(make, "unbatched", (4, 3, 5), (4, 3, 3, 3), padding=2)
    yield _sample(make, "empty-batch", (0, 4, 3, 5), (4, 3, 3, 3))
    yield _sample(make, "tiny", (1, 1, 2, 1), (1, 2, 2, 1), stride=(2, 1), gradcheck=True)


def _samples_3d(make: Maker) -> Iterator[Sample]:
    yield _sample(
        make, "typical", (2, 3, 2, 3, 2), (3, 4, 3, 2, 2), stride=(2, 1, 1), padding=1, layouts=True
    )
    yield _sample(
        make,
        "dilation",
        (1, 2, 3, 2, 2),
        (2, 3, 2, 2, 3),
        stride=(3, 1, 2),
        padding=(1, 0, 2),
        output_padding=(2, 1, 0),
        dilation=(2, 3, 1),
        bias=False,
    )
    yield _sample(make, "groups", (2, 4, 2, 2, 3), (4, 2, 2, 1, 2), groups=2)
    yield _sample(make, "depthwise", (1, 2, 2, 2, 3), (2, 1, 2, 3, 2), stride=(1, 2, 1), groups=2)
    yield _sample(make, "many-channels", (1, 16, 2, 3, 2), (16, 16, 3, 2, 2), padding=1)
    yield _sample(make, "unbatched", (3, 2, 2, 2), (3, 2, 2, 2, 2))
    yield _sample(make, "empty-batch", (0, 3, 2, 2, 2), (3, 2, 2, 2, 2))
    yield _sample(make, "tiny", (1, 1, 2, 1, 1), (1, 2, 2, 1, 1), stride=(2, 1, 1), gradcheck=True)


# name, batch, channels in and out, axes, kernel, stride, padding, groups
_LAYERS: dict[int, tuple[Any, ...]] = {
    1: (
        ("hifigan-512", 16, 512, 256, (256,), 16, 8, 4, 1),
        ("decoder-256", 16, 256, 256, (1024,), 7, 1, 3, 1),
        ("upsample-depthwise", 16, 256, 256, (1000,), 4, 2, 1, 256),
    ),
    2: (
        ("unet-up-512", 32, 512, 256, (32, 32), 2, 2, 0, 1),
        ("dcgan-256", 64, 256, 128, (16, 16), 4, 2, 1, 1),
        ("upsample-depthwise", 32, 96, 96, (56, 56), 4, 2, 1, 96),
    ),
    3: (("unet3d-up-256", 2, 256, 128, (16, 16, 16), 2, 2, 0, 1),),
}


def _workloads(axes: int) -> Callable[[Maker], Iterator[Sample]]:
    def workloads(make: Maker) -> Iterator[Sample]:
        order = {2: torch.channels_last, 3: torch.channels_last_3d}
        for name, n, c, k, size, kernel, stride, padding, groups in _LAYERS[axes]:
            memory_format = order.get(axes, torch.contiguous_format)
            yield Sample(
                name,
                input=make.empty(n, c, *size).contiguous(memory_format=memory_format),
                weight=make.empty(c, k // groups, *(kernel,) * axes),
                bias=make.empty(k),
                stride=stride,
                padding=padding,
                output_padding=0,
                groups=groups,
                dilation=1,
            )

    return workloads


def _rejects(axes: int) -> Callable[[Maker], Iterator[Reject]]:
    op = f"conv_transpose{axes}d"

    def rejects(make: Maker) -> Iterator[Reject]:
        x, w = make(2, 4, *(5,) * axes), make(4, 6, *(3,) * axes)

        def reject(
            name: str, message: str, *, input: Tensor = x, weight: Tensor = w, **arguments: Any
        ) -> Reject:
            return Reject(name, f"{op}: {message}", input=input, weight=weight, **arguments)

        yield reject("channels", "weight expects 5", weight=make(5, 6, *(3,) * axes))
        yield reject("input-dim", f"input must have {axes + 2} dimensions", input=make(5))
        yield reject("bias", "bias must have 6 elements", bias=make(5))
        yield reject("output-padding", "output_padding must be smaller", stride=2, output_padding=2)
        if axes != 2:
            return
        yield reject("groups-in", "4 input channels do not divide into groups", groups=3)
        yield reject("groups-zero", "groups must be positive", groups=0)
        yield reject("weight-dim", "weight must have 4 dimensions", weight=make(4, 6, 3))
        yield reject("weight-empty", "weight has no output", weight=make(4, 0, 3, 3))
        yield reject("bias-groups", "bias must have 12 elements", bias=make(6), groups=2)
        yield reject("padding-word", "padding must be integers", padding="same")
        yield reject("padding-negative", "padding must not be negative", padding=-1)
        yield reject(
            "output-padding-negative", "padding must not be negative", stride=2, output_padding=-1
        )
        yield reject("padding-large", "the output has no pixels", padding=4)
        yield reject("no-rows", "the output has no pixels", input=make(2, 4, 0, 5))
        yield reject("stride-zero", "stride and dilation must be positive", stride=0)
        yield reject("dilation-zero", "stride and dilation must be positive", dilation=(1, 0))
        yield Reject(
            "not-a-tensor",
            f"{op}: input must be a Tensor, not list",
            input=[x],
            weight=w,
        )

    return rejects


def _cost(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
) -> dict[str, Cost]:
    torchs = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.dim() - 3]
    x, w = (torch.empty(t.shape, device="meta") for t in (input, weight))
    y = torchs(x, w, None, stride, padding, output_padding, groups, dilation)
    flops = 2 * input.numel() * math.prod(weight.shape[1:])
    traffic = (input.numel() + weight.numel() + y.numel()) * input.element_size()
    return {"forward": Cost(flops, traffic), "backward": Cost(2 * flops, 2 * traffic)}


_KERNELS = (
    "conv.conv2d_kernel",
    "conv_weight.conv2d_grad_weight_kernel",
    "conv_weight.conv2d_sum_weight_kernel",
    "reduce.channel_sum_kernel",
    "reduce.split_sum_kernel",
    "reorder.reorder_kernel",
)
_DEPTHWISE = (
    "depthwise.depthwise_conv2d_kernel",
    "depthwise.depthwise_conv2d_grad_weight_kernel",
)
_TMA = ("conv_tma.conv2d_tma_kernel", "conv_weight_tma.conv2d_grad_weight_tma_kernel")

for _axes, _op, _reference, _samples in (
    (1, conv_transpose1d, conv_transpose1d_reference, _samples_1d),
    (2, conv_transpose2d, conv_transpose2d_reference, _samples_2d),
    (3, conv_transpose3d, conv_transpose3d_reference, _samples_3d),
):
    register(
        OpSpec(
            name=_op.__name__,
            op=_op,
            reference=_reference,
            kernels=_KERNELS + (_DEPTHWISE if _axes < 3 else ()) + (_TMA if _axes < 3 else ()),
            gradients=("input", "weight", "bias"),
            samples=_samples,
            workloads=_workloads(_axes),
            rejects=_rejects(_axes),
            cost=_cost,
            accuracy="multilinear",
            autocast="lower",
            source=f"torch.nn.functional.{_op.__name__}",
            layers=(f"ConvTranspose{_axes}d",),
            configurations_of="conv3d" if _axes == 3 else "conv2d",
        )
    )
