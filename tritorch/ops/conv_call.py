"""A call of a convolution of one to three axes: its reference, checks, and autograd function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tritorch import backend, binding, checks
from tritorch.ops.activation import checked_residual, epilogue_reference
from tritorch.ops.conv_checks import Ints, checked, checked_transposed, same_padding
from tritorch.ops.conv_function import Convolution, ConvolutionGradInput
from tritorch.ops.geometry import is_channels_last

_TORCHS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def reference(
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
    """conv1d, conv2d or conv3d by the number of axes; a residual is of images."""
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
    x, w, b = _operands(op, input, weight, bias)
    images, filters = _images(axes, x, w)
    if residual is not None and residual.dim() == axes + 1:
        residual = residual[None]
    channels_last = writes_channels_last(axes, images, filters)
    output: Tensor = binding.apply(
        Convolution, images, filters, b, residual, *call.geometry, channels_last, activation
    )
    return _like(x, axes, output)


def transposed(
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
    """conv_transpose1d, conv_transpose2d or conv_transpose3d by the number of axes."""
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
    x, w, b = _operands(op, input, weight, bias)
    images, filters = _images(axes, x, w)
    channels_last = writes_channels_last(axes, images, filters)
    output: Tensor = binding.apply(
        ConvolutionGradInput, images, filters, b, *call.geometry, channels_last
    )
    return _like(x, axes, output)


def _operands(op: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    x, w, b = binding.autocast_to_lower(input, weight, bias)
    checks.same_dtype_and_device(op, x, weight=w, bias=b)
    return x, w, b


def _images(axes: int, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Views with a batch and at least two axes."""
    images = x if x.dim() == axes + 2 else x[None]
    return (images.unsqueeze(2), weight.unsqueeze(2)) if axes == 1 else (images, weight)


def _like(x: Tensor, axes: int, output: Tensor) -> Tensor:
    """The output with the dimensions of x."""
    output = output.squeeze(2) if axes == 1 else output
    return output if x.dim() == axes + 2 else output[0]


def writes_channels_last(axes: int, images: Tensor, filters: Tensor) -> bool:
    # for signals torch looks at the filter only
    return is_channels_last(filters) or (axes > 1 and is_channels_last(images))
