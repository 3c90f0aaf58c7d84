"""Cross-entropy over rows of classes: launches, where their tiles start, gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tritorch import binding, launch
from tritorch.ops import classes, loss, strided
from tritorch.ops.reduce import accumulator_dtype
from tritorch.ops.strided import Layout

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
    """Loss, what the gradients need of each row, denominator; what is not used has no element.

    Of rows that a tile holds nothing is kept: the gradients compute it again as they read them.
    """
    dtype = accumulator_dtype(input.dtype)
    shape = (input.shape[0], *input.shape[2:])
    values = 3 if spreads(target, label_smoothing) else 2
    keep_rows = keep_rows and not kernels.holds_rows(input.shape[1], input.stride(1) == 1)
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
    of_classes, spread = _constants(target, weight, ignore_index, label_smoothing)
    run = _plan_forward(Layout.of(input), target.stride(), of_classes, spread, reduced)
    partial = rows.new_empty(1 if probabilities else 2, *run.grid) if reduced else result
    kept = rows if are_kept(rows) else None
    run(input, input, target, weight, partial, kept, floats=(label_smoothing,))
    if reduced:
        divides = denominator.numel() == 1
        divisor = input.numel() // input.shape[1] if reduction == "mean" else 1
        # a sum has no use for the weights
        sums = partial if divides else partial[:1]
        loss.total(sums, result, divisor, denominator if divides else None)
    return result, rows, denominator


def are_kept(rows: Tensor) -> bool:
    """Whether the forward pass kept anything of the rows."""
    return rows.dim() > 1


def computed_again(
    rows: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """What the gradients need of each row, where `rows` are not kept."""
    shape = (input.shape[0], *input.shape[2:])
    losses, rows = input.new_empty(shape), rows.new_empty((3, *shape))
    of_classes, spread = _constants(target, weight, ignore_index, label_smoothing)
    run = _plan_forward(Layout.of(input), target.stride(), of_classes, spread, False)
    run(input, input, target, weight, losses, rows, floats=(label_smoothing,))
    return rows


@launch.planned
def _plan_forward(
    input: Layout,
    target: tuple[int, ...],
    of_classes: tuple[int, int],
    spread: bool,
    reduced: bool,
) -> launch.Prepared:
    config = _config(input)
    nest, strides, layout = walk(config, input, (target,), ())
    return launch.Prepared(
        kernels.cross_entropy_forward_kernel,
        (math.ceil(nest.numel / config.kwargs["BLOCK_N"]),),
        (nest.numel, input.shape[1], *nest.sizes[1:], *strides, *of_classes),
        config,
        SPREAD=spread,
        PROBABILITIES=len(target) == len(input.shape),
        REDUCED=reduced,
        **layout,
    )


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
    strides = target.stride(), grad.stride(), grad_output.stride()
    of_classes, spread = _constants(target, weight, ignore_index, label_smoothing)
    run = _plan_backward(Layout.of(input), *strides, divisor, of_classes, spread, wanted)
    kept: Tensor | None = rows
    if not are_kept(rows):
        kept = None
        if input.shape[1] > run.config.kwargs["BLOCK_C"]:
            of_rows = ignore_index, label_smoothing
            kept = computed_again(rows, input, target, weight, *of_rows)
    tensors = input, target, weight, kept, grad_output, denominator, grad
    run(input, *tensors, floats=(label_smoothing,))
    return grad


@launch.planned
def _plan_backward(
    input: Layout,
    target: tuple[int, ...],
    grad: tuple[int, ...],
    grad_output: tuple[int, ...],
    divisor: int,
    of_classes: tuple[int, int],
    spread: bool,
    wanted: str,
) -> launch.Prepared:
    config = _config(input)
    nest, strides, layout = walk(config, input, (target, grad), (grad_output,))
    rows, classes = (input.shape[0], *input.shape[2:]), input.shape[1]
    lanes = classes + layout["ALIGN"] - 1 if layout["SHIFTED"] else classes
    tiles_n = math.ceil(nest.numel / config.kwargs["BLOCK_N"])
    tiles_c = math.ceil(lanes / config.kwargs["BLOCK_C"])
    steps = kernels.num_steps(tiles_n, tiles_c)
    splits = math.ceil(tiles_c / steps)
    sizes = (nest.numel, classes, steps, splits, divisor, *nest.sizes[1:])
    return launch.Prepared(
        kernels.cross_entropy_backward_kernel,
        (tiles_n * splits,),
        (*sizes, *strides, *of_classes),
        config,
        SPREAD=spread,
        PROBABILITIES=len(target) == len(input.shape),
        OF_INPUT=wanted == "input",
        ONE_GRAD_LOSS=loss.is_one_element(rows, grad_output),
        **layout,
    )


def _config(input: Layout) -> Any:
    rows = input.shape[0] * math.prod(input.shape[2:])
    return launch.config(kernels.cross_entropy_config, rows, input.shape[1], input.stride(1) == 1)


def _constants(
    target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[tuple[int, int], bool]:
    """What plans take of the classes, and whether their weights are spread."""
    return (weight_stride(weight), ignore_index), spreads(target, label_smoothing)


def weight_stride(weight: Tensor | None) -> int:
    """From one class to the next."""
    return 1 if weight is None else weight.stride(0)


def walk(
    config: Any,
    input: Layout,
    classified: Sequence[tuple[int, ...]],
    others: Sequence[tuple[int, ...]],
) -> tuple[strided.Nest, list[int], dict[str, Any]]:
    """Rows in row-major order: their nest, strides of every tensor, constants of the layout.

    Beside the logits `classified` are strides of the target and of what has its shape, `others` of
    what has a row's; a target of class indices has no stride along the classes.
    """
    tensors = input.strides, *classified, *others
    nest = classes.nest_of_rows("cross_entropy", input.shape, tensors)
    with_classes = [tensor for tensor in tensors if len(tensor) == len(input.shape)]
    strides: list[int] = []
    for place, (tensor, along) in enumerate(zip(tensors, nest.strides, strict=True)):
        if place <= len(classified):
            strides.append(tensor[1] if tensor in with_classes else 1)
        strides += along
    align, shifted = _alignment(config, input, with_classes)
    return nest, strides, {"ALIGN": align, "SHIFTED": shifted, "INDEX_64": nest.wide}


def _alignment(config: Any, input: Layout, tensors: Sequence[tuple[int, ...]]) -> tuple[int, bool]:
    """Elements, a power of two, that tiles start at a multiple of, and whether rows do not."""
    classes = input.shape[1]
    # of a 128-bit access
    width = 16 // input.itemsize
    if any(strides[1] != 1 for strides in tensors):
        return 1, False
    row_strides = [stride for strides in tensors for stride in (strides[0], *strides[2:])]
    align = math.gcd(width, classes, *row_strides)
    # the shift must be the same in all of them, and an edge that it adds one tile of many
    alike = all(strides == input.strides for strides in tensors)
    if align < width and alike and classes > 2 * config.kwargs["BLOCK_C"]:
        return width, True
    return align, False
