"""Cross-entropy over rows of classes: launches, where their tiles start, gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tritorch import binding, launch
from tritorch.ops import classes, loss, strided
from tritorch.ops.reduce import accumulator_dtype

kernels = launch.kernels("cross_entropy")


def first_class(tensor: Tensor) -> Tensor:
    """Where the rows of (N, C, d1, ...) start: (N, d1, ...)."""
    return tensor.select(1, 0)


def _outputs(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    keep_rows: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, what the gradients need of each row, denominator; what is not used has no element."""
    dtype = accumulator_dtype(input.dtype)
    shape = (input.shape[0], *input.shape[2:])
    values = 3 if spreads(target, label_smoothing) else 2
    divides = reduction == "mean" and not target.is_floating_point()
    return (
        input.new_empty(shape if reduction == "none" else ()),
        input.new_empty((values, *shape) if keep_rows else (0,), dtype=dtype),
        input.new_empty(() if divides else (0,), dtype=dtype),
    )


def spreads(target: Tensor, label_smoothing: float) -> bool:
    """Whether more classes than one have a weight in the loss of a row."""
    return target.is_floating_point() or label_smoothing > 0


@binding.library_op(
    "cross_entropy_forward(Tensor input, Tensor target, Tensor? weight, int ignore_index, "
    "str reduction, float label_smoothing, bool keep_rows) -> (Tensor, Tensor, Tensor)",
    fake=_outputs,
)
def forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    keep_rows: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    result, rows, denominator = _outputs(
        input, target, weight, ignore_index, reduction, label_smoothing, keep_rows
    )
    reduced, probabilities = reduction != "none", target.is_floating_point()
    if not probabilities:
        classes.check_range("cross_entropy", input, target, ignore_index)
    count = first_class(input).numel()
    config = _config(input)
    programs = math.ceil(count / config.kwargs["BLOCK_N"])
    partial = rows.new_empty((1 if probabilities else 2, programs)) if reduced else result
    nest, strides, layout = walk(config, (input, target), ())
    launch.run(
        kernels.cross_entropy_forward_kernel,
        (programs,),
        input,
        target,
        weight,
        partial,
        rows if keep_rows else None,
        count,
        input.shape[1],
        *nest.sizes[1:],
        *strides,
        weight.stride(0) if weight is not None else 1,
        ignore_index,
        label_smoothing,
        on=input,
        config=config,
        SPREAD=spreads(target, label_smoothing),
        PROBABILITIES=probabilities,
        REDUCED=reduced,
        **layout,
    )
    if reduced:
        divides = denominator.numel() == 1
        divisor = count if reduction == "mean" else 1
        # a sum has no use for the weights
        sums = partial if divides else partial[:1]
        loss.total(sums, result, divisor, denominator if divides else None)
    return result, rows, denominator


def _grad(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    rows: Tensor,
    denominator: Tensor | None,
    ignore_index: int,
    divisor: int,
    label_smoothing: float,
    wanted: str,
) -> Tensor:
    return strided.empty_like(input if wanted == "input" else target)


@binding.library_op(
    "cross_entropy_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, "
    "Tensor rows, Tensor? denominator, int ignore_index, SymInt divisor, float label_smoothing, "
    "str wanted) -> Tensor",
    fake=_grad,
)
def backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    rows: Tensor,
    denominator: Tensor | None,
    ignore_index: int,
    divisor: int,
    label_smoothing: float,
    wanted: str,
) -> Tensor:
    """One gradient, from that of each row's loss."""
    grad = _grad(
        grad_output,
        input,
        target,
        weight,
        rows,
        denominator,
        ignore_index,
        divisor,
        label_smoothing,
        wanted,
    )
    count, classes = grad_output.numel(), input.shape[1]
    config = _config(input)
    nest, strides, layout = walk(config, (input, target, grad), (grad_output,))
    lanes = classes + layout["ALIGN"] - 1 if layout["SHIFTED"] else classes
    tiles_n = math.ceil(count / config.kwargs["BLOCK_N"])
    tiles_c = math.ceil(lanes / config.kwargs["BLOCK_C"])
    steps = kernels.num_steps(tiles_n, tiles_c)
    splits = math.ceil(tiles_c / steps)
    launch.run(
        kernels.cross_entropy_backward_kernel,
        (tiles_n * splits,),
        input,
        target,
        weight,
        rows,
        grad_output,
        denominator,
        grad,
        count,
        classes,
        steps,
        splits,
        divisor,
        *nest.sizes[1:],
        *strides,
        weight.stride(0) if weight is not None else 1,
        ignore_index,
        label_smoothing,
        on=input,
        config=config,
        SPREAD=spreads(target, label_smoothing),
        PROBABILITIES=target.is_floating_point(),
        OF_INPUT=wanted == "input",
        ONE_GRAD_LOSS=loss.is_one_element(grad_output),
        **layout,
    )
    return grad


def _config(input: Tensor) -> Any:
    return launch.config(
        kernels.cross_entropy_config,
        first_class(input).numel(),
        input.shape[1],
        input.stride(1) == 1,
    )


def walk(
    config: Any, classified: tuple[Tensor, ...], others: tuple[Tensor, ...]
) -> tuple[strided.Nest, list[int], dict[str, Any]]:
    """Rows in row-major order: their nest, strides of every tensor, constants of the layout.

    `classified` are logits, target and what has their shape, `others` have a row's shape; a target
    of class indices has no stride along the classes.
    """
    dim = classified[0].dim()
    rows = [first_class(t) if t.dim() == dim else t for t in (*classified, *others)]
    # what the forward pass keeps of the rows has their shape, and decides the order
    nest = strided.nest("cross_entropy", *rows, torch.empty(rows[0].shape, device="meta"))
    strides: list[int] = []
    for tensor, of_rows in zip(classified, nest.strides, strict=False):
        strides += [tensor.stride(1) if tensor.dim() == dim else 1, *of_rows]
    for of_rows in nest.strides[len(classified) : -1]:
        strides += of_rows
    with_classes = [tensor for tensor in classified if tensor.dim() == dim]
    align, shifted = _alignment(config, with_classes)
    wide = nest.wide or any(strided.is_wide(t.shape, t.stride()) for t in with_classes)
    return nest, strides, {"ALIGN": align, "SHIFTED": shifted, "INDEX_64": wide}


def _alignment(config: Any, tensors: list[Tensor]) -> tuple[int, bool]:
    """Elements, a power of two, that tiles start at a multiple of, and whether rows do not."""
    first = tensors[0]
    classes = first.shape[1]
    # of a 128-bit access
    width = 16 // first.element_size()
    if any(tensor.stride(1) != 1 for tensor in tensors):
        return 1, False
    row_strides = [stride for tensor in tensors for stride in first_class(tensor).stride()]
    align = math.gcd(width, classes, *row_strides)
    # the shift must be the same in all of them, and an edge that it adds one tile of many
    alike = all(tensor.stride() == first.stride() for tensor in tensors)
    if align < width and alike and classes > 2 * config.kwargs["BLOCK_C"]:
        return width, True
    return align, False
