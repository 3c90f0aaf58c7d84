"""Convolution of images: reference, public function, declaration; and what a call of one, two or
three axes does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import backend, binding, checks
from tritorch.ops import conv_cost
from tritorch.ops.activation import checked_residual, epilogue_reference, with_residual
from tritorch.ops.conv_checks import Ints, checked, same_padding
from tritorch.ops.conv_function import Convolution
from tritorch.ops.conv_samples import rejects, samples, workloads
from tritorch.ops.geometry import is_channels_last
from tritorch.registry import Cost, OpSpec, register
from tritorch.repeats.decorator import repeated

Pair = int | Sequence[int]


def conv2d_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    activation: str | None = None,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(cross-correlation of images with filters + bias + residual)."""
    given = stride, padding, dilation, groups, activation, residual
    return reference_of(2, input, weight, bias, *given)


@repeated
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    activation: str | None = None,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(cross-correlation of images with filters + bias + residual).

    One number stands for both axes of the image in `stride`, `padding` and `dilation`.

    Args:
        input: (N, C, H, W) or (C, H, W), any strides; float32, float16, bfloat16 or float64 for the
            kernels.  Fastest as channels_last: 16-bit and TF32 images in another order are copied
            to it, and results from it, where the products are worth the copies.
        weight: (K, C / groups, R, S), the input's dtype and device.  Fastest as channels_last: from
            another order each call, and each gradient of the input, may copy it.
        bias: (K,) or None.
        stride: pixels between positions of the filter.
        padding: zeros on each side; "valid" for none; "same" for an output of the input's size,
            with a stride of 1 and any odd row or column of zeros at the bottom or the right.
        dilation: pixels between taps of the filter.
        groups: output channels read the input channels of their own group alone; as many groups as
            channels make a depthwise convolution.
        activation: None, "relu", "relu6", "leaky_relu" of slope 0.01, "silu", "gelu", "gelu_tanh",
            "sigmoid", "tanh", "hardswish" or "hardsigmoid", applied before the result is rounded
            and stored.  Autograd keeps the result, or the activation's input where the derivative
            cannot be computed from the result.
        residual: None, or a tensor of the result's shape and the input's dtype, added before the
            activation; fastest in the result's memory format: one of 16 bits in another order may
            be copied to channels_last with the images.  Autograd keeps it where it keeps the
            activation's input.

    Returns:
        (N, K, P, Q) or (K, P, Q), P = (H + 2 * padding - dilation * (R - 1) - 1) // stride + 1 and
        Q likewise; channels_last if the input or the weight is.  Sums are kept in float32 (float64
        for float64); float32 products use TF32 where `torch.backends.cudnn` allows it.  Gradients
        have the memory format of their tensors.  Padding is multiplied as zeros: an infinite weight
        gives NaN at the border of the output, as in torch, and of the gradient of the input, but
        where a kernel for Hopper leaves out a tap that reads only padding for a whole tile.

    Raises:
        RuntimeError: sizes, channels or groups that do not match, a filter larger than the padded
            image, stride, dilation or groups that are not positive, padding that is negative or
            unknown, "same" with another stride, different dtypes or devices.
        TypeError: `input` or `weight` is not a tensor.
        ValueError: an unknown activation.

    Source: `torch.nn.functional.conv2d`.
    """
    return convolution(
        2,
        conv2d_reference,
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        activation,
        residual,
    )


_TORCHS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def reference_of(
    axes: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints | str,
    dilation: Ints,
    groups: int,
    activation: str | None,
    residual: Tensor | None = None,
) -> Tensor:
    """torch's convolution with a residual and an activation, without torch's warning that an uneven
    "same" padding makes a copy.
    """
    if padding == "same" and weight.dim() == axes + 2:
        op = f"conv{axes}d"
        sides = same_padding(weight.shape[2:], checks.ints(op, "dilation", dilation, axes))
        if (
            any(before != after for before, after in sides)
            and checks.ints(op, "stride", stride, axes) == (1,) * axes
        ):
            last_first = [zeros for side in reversed(sides) for zeros in side]
            input, padding = F.pad(input, last_first), 0
    y = _TORCHS[axes](input, weight, bias, stride, padding, dilation, groups)
    return epilogue_reference(y, activation, residual)


def convolution(
    axes: int,
    of_reference: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints | str,
    dilation: Ints,
    groups: int,
    activation: str | None,
    residual: Tensor | None = None,
) -> Tensor:
    """The convolution of so many axes; a residual is of images."""
    op = f"conv{axes}d"
    checks.tensor(op, {"bias": bias, "residual": residual}, input=input, weight=weight)
    call = checked(op, axes, input, weight, bias, stride, padding, dilation, groups, activation)
    added: dict[str, Tensor] = {}
    if residual is not None:
        shape = (*input.shape[: -axes - 1], weight.shape[0], *call.geometry[0])
        residual = added["residual"] = checked_residual(op, input, residual, shape)
    if not backend.runs_triton(op, input, weight, bias, residual, declined=call.declined):
        given = stride, padding, dilation, groups, activation
        return of_reference(input, weight, bias, *given, **added)
    x, w, b = operands(op, input, weight, bias)
    images, filters = images_of(axes, x, w)
    if residual is not None and residual.dim() == axes + 1:
        residual = residual[None]
    channels_last = writes_channels_last(axes, images, filters)
    output: Tensor = binding.apply(
        Convolution, images, filters, b, residual, *call.geometry, channels_last, activation
    )
    return like(x, axes, output)


def operands(op: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    x, w, b = binding.autocast_to_lower(input, weight, bias)
    checks.same_dtype_and_device(op, x, weight=w, bias=b)
    return x, w, b


def images_of(axes: int, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Views with a batch and at least two axes."""
    images = x if x.dim() == axes + 2 else x[None]
    return (images.unsqueeze(2), weight.unsqueeze(2)) if axes == 1 else (images, weight)


def like(x: Tensor, axes: int, output: Tensor) -> Tensor:
    """The output with the dimensions of x."""
    output = output.squeeze(2) if axes == 1 else output
    return output if x.dim() == axes + 2 else output[0]


def writes_channels_last(axes: int, images: Tensor, filters: Tensor) -> bool:
    # for signals torch looks at the filter only
    return is_channels_last(filters) or (axes > 1 and is_channels_last(images))


def _cost(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    activation: str | None = None,
    *,
    residual: Tensor | None = None,
) -> dict[str, Cost]:
    x, w = (torch.empty(t.shape, device="meta") for t in (input, weight))
    y = conv2d_reference(x, w, None, stride, padding, dilation, groups)
    cost = conv_cost.of_convolution(input, weight, y.shape, stride)
    return cost if residual is None else with_residual(cost, residual)


register(
    OpSpec(
        name="conv2d",
        op=conv2d,
        reference=conv2d_reference,
        kernels=(
            "activation.activation_backward_kernel",
            "conv.conv2d_kernel",
            "conv_tma.conv2d_tma_kernel",
            "conv_weight.conv2d_grad_weight_kernel",
            "conv_weight_tma.conv2d_grad_weight_tma_kernel",
            "depthwise.depthwise_conv2d_kernel",
            "depthwise.depthwise_conv2d_grad_weight_kernel",
            "matmul_tma.matmul_tma_kernel",
            "reduce.channel_sum_kernel",
            "reduce.many_splits_sum_kernel",
            "reduce.split_sum_kernel",
            "reorder.reorder_kernel",
            "stem.pack_pixels_kernel",
        ),
        gradients=("input", "weight", "bias", "residual"),
        samples=samples,
        workloads=workloads,
        rejects=rejects,
        cost=_cost,
        accuracy="multilinear",
        autocast="lower",
        source="torch.nn.functional.conv2d",
        layers=("Conv2d",),
    )
)
