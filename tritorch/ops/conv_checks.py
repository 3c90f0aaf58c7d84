"""What a convolution's shapes and numbers must be, and the geometry that they give its kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritorch import checks
from tritorch.ops.activation import check_epilogue
from tritorch.ops.geometry import MAX_INDEX

Ints = int | Sequence[int]

# programs along an axis of the grid
_MAX_GROUPS = 2**16 - 1


class Call(NamedTuple):
    """What shapes and numbers say of a call: size, stride, padding and dilation of images or
    volumes, then the groups, and why the kernels do not take it.
    """

    geometry: tuple[Any, ...]
    declined: str | None

    @classmethod
    def of(
        cls,
        input: torch.Size,
        weight: torch.Size,
        groups: int,
        *geometry: tuple[int, ...],
    ) -> Call:
        declined = _declined(input, weight, geometry[0], groups)
        if len(weight) > 3:
            return cls((*geometry, groups), declined)
        # a signal is an image of one row
        size, stride, padding, dilation = geometry
        return cls(((1, *size), (1, *stride), (0, *padding), (1, *dilation), groups), declined)


def checked(
    op: str,
    axes: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints | str,
    dilation: Ints,
    groups: int,
    activation: str | None,
) -> Call:
    """The call of a convolution, after all checks of its shapes and numbers."""
    if type(groups) is not int:
        groups = checks.integer(op, "groups", groups)
    return _convolution(
        op,
        axes,
        input.shape,
        weight.shape,
        None if bias is None else bias.shape,
        checks.ints(op, "stride", stride, axes),
        padding if isinstance(padding, str) else checks.ints(op, "padding", padding, axes),
        checks.ints(op, "dilation", dilation, axes),
        groups,
        activation,
    )


@checks.remembered
def _convolution(
    op: str,
    axes: int,
    input: torch.Size,
    weight: torch.Size,
    bias: torch.Size | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
    activation: str | None,
) -> Call:
    _check_shapes(op, axes, input, weight, groups)
    _check_channels(op, input, weight, bias, groups, transposed=False)
    sides = _check_padding(op, input, weight, stride, padding, dilation)
    check_epilogue(op, activation)
    size = tuple(
        (n + sum(side) - d * (k - 1) - 1) // s + 1
        for n, k, side, s, d in zip(input[-axes:], weight[2:], sides, stride, dilation, strict=True)
    )
    before = tuple(side[0] for side in sides)
    return Call.of(input, weight, groups, size, stride, before, dilation)


@checks.remembered
def checked_transposed(
    axes: int,
    input: torch.Size,
    weight: torch.Size,
    bias: torch.Size | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    output_padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Call:
    op = f"conv_transpose{axes}d"
    _check_shapes(op, axes, input, weight, groups)
    _check_channels(op, input, weight, bias, groups, transposed=True)
    _check_steps(op, stride, dilation)
    if min(*padding, *output_padding) < 0:
        checks.fail(
            RuntimeError,
            op,
            "padding must not be negative",
            padding=padding,
            output_padding=output_padding,
        )
    if any(
        extra >= max(s, d) for extra, s, d in zip(output_padding, stride, dilation, strict=True)
    ):
        checks.fail(
            RuntimeError,
            op,
            "output_padding must be smaller than the stride or the dilation",
            output_padding=output_padding,
            stride=stride,
            dilation=dilation,
        )
    size = tuple(
        (n - 1) * s - 2 * p + d * (k - 1) + extra + 1
        for n, k, s, p, d, extra in zip(
            input[-axes:], weight[2:], stride, padding, dilation, output_padding, strict=True
        )
    )
    if 0 in input[-axes:] or min(size) < 1:
        checks.fail(
            RuntimeError, op, "the output has no pixels", input=input, weight=weight, size=size
        )
    return Call.of(input, weight, groups, size, stride, padding, dilation)


def _declined(
    input: torch.Size, weight: torch.Size, size: tuple[int, ...], groups: int
) -> str | None:
    axes = len(size)
    if input[-axes - 1] == 0:
        return "no channels"
    batch = input[0] if len(input) == axes + 2 else 1
    pixels = batch * max(math.prod(input[-axes:]), math.prod(size))
    if checks.is_over(pixels, MAX_INDEX) or checks.is_over(math.prod(weight), MAX_INDEX):
        return "more than 2**30 pixels or weights"
    if groups > _MAX_GROUPS:
        return "more than 65535 groups"
    return None


def _check_shapes(op: str, axes: int, input: torch.Size, weight: torch.Size, groups: int) -> None:
    if len(input) not in (axes + 1, axes + 2):
        checks.fail(
            RuntimeError,
            op,
            f"input must have {axes + 2} dimensions, or {axes + 1} unbatched",
            input=input,
        )
    if len(weight) != axes + 2 or 0 in (weight[0], *weight[2:]):
        checks.fail(
            RuntimeError,
            op,
            f"weight must have {axes + 2} dimensions, none empty",
            weight=weight,
        )
    if groups <= 0:
        checks.fail(RuntimeError, op, "groups must be positive", groups=groups)


def _check_channels(
    op: str,
    input: torch.Size,
    weight: torch.Size,
    bias: torch.Size | None,
    groups: int,
    transposed: bool,
) -> None:
    kind = "input" if transposed else "output"
    if weight[0] % groups:
        checks.fail(
            RuntimeError,
            op,
            f"{weight[0]} {kind} channels do not divide into groups",
            weight=weight,
            groups=groups,
        )
    first, second = weight[0], weight[1] * groups
    inputs, outputs = (first, second) if transposed else (second, first)
    if input[1 - len(weight)] != inputs:
        checks.fail(
            RuntimeError,
            op,
            f"weight expects {inputs} input channels",
            input=input,
            weight=weight,
            groups=groups,
        )
    if transposed and outputs == 0:
        checks.fail(RuntimeError, op, "weight has no output channels", weight=weight)
    if bias is not None and bias != (outputs,):
        checks.fail(
            RuntimeError, op, f"bias must have {outputs} elements", bias=bias, weight=weight
        )


def _check_steps(op: str, stride: Sequence[int], dilation: Sequence[int]) -> None:
    if min(stride) <= 0 or min(dilation) <= 0:
        checks.fail(
            RuntimeError,
            op,
            "stride and dilation must be positive",
            stride=stride,
            dilation=dilation,
        )


def same_padding(kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """Zeros before and after each axis: an odd one goes to the end."""
    totals = [d * (size - 1) for d, size in zip(dilation, kernel, strict=True)]
    return [(total // 2, total - total // 2) for total in totals]


def _check_padding(
    op: str,
    input: torch.Size,
    weight: torch.Size,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
) -> list[tuple[int, int]]:
    """Zeros before and after each axis of the image."""
    _check_steps(op, stride, dilation)
    if padding == "same":
        if max(stride) > 1:
            checks.fail(RuntimeError, op, "padding 'same' takes a stride of 1", stride=stride)
        sides = same_padding(weight[2:], dilation)
    elif isinstance(padding, str):
        if padding != "valid":
            checks.fail(
                RuntimeError,
                op,
                "padding must be 'same', 'valid' or integers",
                received=padding,
            )
        sides = [(0, 0)] * len(stride)
    else:
        sides = [(n, n) for n in padding]
        if min(sides) < (0, 0):
            checks.fail(RuntimeError, op, "padding must not be negative", padding=padding)
    if any(
        n == 0 or n + sum(side) < d * (k - 1) + 1
        for n, k, side, d in zip(input[-len(stride) :], weight[2:], sides, dilation, strict=True)
    ):
        checks.fail(
            RuntimeError,
            op,
            "the filter is larger than the padded image",
            input=input,
            weight=weight,
            padding=padding,
            dilation=dilation,
        )
    return sides
