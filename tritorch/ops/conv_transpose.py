"""Transposed convolutions, whose forward is the gradient of a convolution's input: references,
public functions, declarations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import backend, binding, checks
from tritorch.ops.conv import images_of, like, operands, writes_channels_last
from tritorch.ops.conv_checks import checked_transposed
from tritorch.ops.conv_function import ConvolutionGradInput
from tritorch.ops.conv_transpose_samples import (
    rejects_of,
    samples_1d,
    samples_2d,
    samples_3d,
    workloads_of,
)
from tritorch.registry import Cost, OpSpec, register
from tritorch.repeats.decorator import repeated

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


@repeated
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
    return _transposed(
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


@repeated
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
    """Transposed convolution of images: the gradient of `conv2d` by its input, plus a bias.

    One number stands for both axes of the image.

    Args:
        input: (N, C, H, W) or (C, H, W), any strides; float32, float16, bfloat16 or float64 for the
            kernels.  Fastest as channels_last: 16-bit and TF32 images in another order are copied
            to it, and results from it, where the products are worth the copies.
        weight: (C, K / groups, R, S), the input's dtype and device.  Fastest as channels_last: from
            another order each call, and each gradient of the input, may copy it.
        bias: (K,) or None.
        stride: pixels of the output between the places that neighbouring pixels of the input reach.
        padding: pixels cut off each side of the output.
        output_padding: rows and columns added at the bottom and the right, fewer than the stride or
            than the dilation.
        groups: output channels read the input channels of their own group alone.
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
    return _transposed(
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


@repeated
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
    return _transposed(
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


def _transposed(
    axes: int,
    of_reference: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    output_padding: Ints,
    groups: int,
    dilation: Ints,
) -> Tensor:
    """The transposed convolution of so many axes."""
    op = f"conv_transpose{axes}d"
    checks.tensor(op, {"bias": bias}, input=input, weight=weight)
    if type(groups) is not int:
        groups = checks.integer(op, "groups", groups)
    call = checked_transposed(
        axes,
        input.shape,
        weight.shape,
        None if bias is None else bias.shape,
        checks.ints(op, "stride", stride, axes),
        checks.ints(op, "padding", padding, axes),
        checks.ints(op, "output_padding", output_padding, axes),
        checks.ints(op, "dilation", dilation, axes),
        groups,
    )
    if not backend.runs_triton(op, input, weight, bias, declined=call.declined):
        return of_reference(input, weight, bias, stride, padding, output_padding, groups, dilation)
    x, w, b = operands(op, input, weight, bias)
    images, filters = images_of(axes, x, w)
    channels_last = writes_channels_last(axes, images, filters)
    output: Tensor = binding.apply(
        ConvolutionGradInput, images, filters, b, *call.geometry, channels_last
    )
    return like(x, axes, output)


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
    "reduce.channel_sum_kernel",
    "reduce.many_splits_sum_kernel",
    "reduce.split_sum_kernel",
    "reorder.reorder_kernel",
)
_DEPTHWISE = (
    "depthwise.depthwise_conv2d_kernel",
    "depthwise.depthwise_conv2d_grad_weight_kernel",
)
_TMA = ("conv_tma.conv2d_tma_kernel", "conv_weight_tma.conv2d_grad_weight_tma_kernel")

for _axes, _op, _reference, _samples in (
    (1, conv_transpose1d, conv_transpose1d_reference, samples_1d),
    (2, conv_transpose2d, conv_transpose2d_reference, samples_2d),
    (3, conv_transpose3d, conv_transpose3d_reference, samples_3d),
):
    register(
        OpSpec(
            name=_op.__name__,
            op=_op,
            reference=_reference,
            kernels=_KERNELS + (_DEPTHWISE if _axes < 3 else ()) + (_TMA if _axes < 3 else ()),
            gradients=("input", "weight", "bias"),
            samples=_samples,
            workloads=workloads_of(_axes),
            rejects=rejects_of(_axes),
            cost=_cost,
            accuracy="multilinear",
            autocast="lower",
            source=f"torch.nn.functional.{_op.__name__}",
            layers=(f"ConvTranspose{_axes}d",),
            configurations_of="conv3d" if _axes == 3 else "conv2d",
        )
    )
