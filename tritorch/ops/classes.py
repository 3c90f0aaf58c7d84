"""Class indices as targets, weights of classes, rows of classes: their checks and loop nests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tritorch import backend, checks
from tritorch.ops import strided


def count_of(input: Tensor) -> int:
    """The number of classes of (N, C, d1, ...) or (C,)."""
    return input.shape[min(1, input.dim() - 1)]


def check_indices(op: str, input: Tensor, target: Tensor, otherwise: str = "") -> None:
    """RuntimeError or ValueError, as torch has it, unless there is an index for every row.

    `otherwise`: what else the target may be.
    """
    shape = (input.shape[0], *input.shape[2:]) if input.dim() > 1 else (1,)
    if input.dim() == 1:
        fits = target.dim() == 0 or target.shape == shape
        as_many = target.dim() != 1
    else:
        fits = target.shape == shape
        as_many = target.dim() > 0 and target.shape[0] == input.shape[0]
    if not fits:
        checks.fail(
            RuntimeError if as_many else ValueError,
            op,
            f"class indices must have shape {shape}{otherwise}",
            input=input,
            target=target,
        )
    if target.dtype not in (torch.int64, torch.uint8):
        checks.fail(RuntimeError, op, "class indices must be int64 or uint8", target=target)
    if target.dtype == torch.uint8 and target.dim() > 1 and target.numel():
        checks.fail(RuntimeError, op, "class indices of images must be int64", target=target)


def check_weight(op: str, input: Tensor, weight: Tensor | None, differentiable: bool) -> None:
    """RuntimeError unless each class has a weight, through which no gradient flows."""
    if weight is None:
        return
    classes = count_of(input)
    if weight.shape != (classes,):
        checks.fail(
            RuntimeError,
            op,
            f"weight must have one element for each of {classes} classes",
            weight=weight,
        )
    if not differentiable and weight.requires_grad and torch.is_grad_enabled():
        rule = "with class indices no gradient flows to weight"
        checks.fail(RuntimeError, op, rule, weight=weight)


def check_range(op: str, input: Tensor, target: Tensor, ignore_index: int) -> None:
    """IndexError for a class out of range, where the host may look at the values."""
    # on a GPU it would wait for them: there the kernels turn such a loss into NaN
    if input.is_cuda or not backend.INTERPRETING:
        return
    # an index of one byte would be compared with the ignored one in a byte
    classes = target.long()
    wrong = ((classes < 0) | (classes >= input.shape[1])) & (classes != ignore_index)
    if bool(wrong.any()):
        rule = f"target {int(classes[wrong][0])} is out of bounds"
        checks.fail(IndexError, op, rule, input=input, target=target)


def nest_of_rows(
    op: str, shape: tuple[int, ...], tensors: Sequence[tuple[int, ...]]
) -> strided.Nest:
    """The loop nest over the rows of (N, C, d1, ...) in row-major order, from strides of tensors
    with classes or without; wide too where an offset of a class is.
    """
    with_classes = [strides for strides in tensors if len(strides) == len(shape)]
    first = [(t[0], *t[2:]) if len(t) == len(shape) else t for t in tensors]
    nest = strided.nest_in_order(op, (shape[0], *shape[2:]), *first)
    wide = nest.wide or any(strided.is_wide(shape, strides) for strides in with_classes)
    return nest._replace(wide=wide)
