"""What losses share: elementwise launches, sums in a fixed order, checks of arguments."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tritorch import backend, binding, checks, launch
from tritorch.ops import strided
from tritorch.ops.reduce import accumulator_dtype
from tritorch.registry import Cost

kernels = launch.kernels("loss")

KERNELS = (
    "loss.elementwise_loss_forward_kernel",
    "loss.elementwise_loss_backward_kernel",
    "loss.loss_total_kernel",
)

_NO_STRIDES = (0,) * strided.RANK
_REDUCTIONS = ("none", "mean", "sum")

Wanted = Literal["input", "target"]


def _outputs(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    loss: str,
    reduction: str,
    threshold: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The losses, and the sum of the weights where the mean divides by it, else no element."""
    result = strided.empty_like(input) if reduction == "none" else input.new_empty(())
    # the mean of the other losses divides by the number of elements, whatever their weights
    divides = loss in ("mse_loss", "l1_loss") and reduction == "mean" and weight is not None
    shape = () if divides else (0,)
    return result, input.new_empty(shape, dtype=accumulator_dtype(input.dtype))


@binding.library_op(
    "elementwise_loss_forward(Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, "
    "str loss, str reduction, float threshold=1.0) -> (Tensor, Tensor)",
    fake=_outputs,
)
def elementwise_loss_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    loss: str,
    reduction: str,
    threshold: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Losses and denominator; weights broadcast, the target has the input's shape and dtype.

    `threshold`: where smooth_l1_loss and huber_loss pass from a square to a line.
    """
    if loss == "binary_cross_entropy":
        _check_probabilities(input, target)
    result, denominator = _outputs(input, target, weight, pos_weight, loss, reduction)
    reduced, divides = reduction != "none", denominator.numel() == 1
    programs = math.ceil(input.numel() / kernels.BLOCK)
    partial = denominator.new_empty((2 if divides else 1, programs)) if reduced else result
    operands = (input, target, _expand(weight, input), _expand(pos_weight, input))
    _launch(
        kernels.elementwise_loss_forward_kernel,
        (*operands, partial),
        (*operands, None if reduced else result),
        (),
        threshold,
        LOSS=loss,
        REDUCED=reduced,
        SUMS_WEIGHTS=divides,
    )
    if reduced:
        divisor = input.numel() if reduction == "mean" else 1
        total(partial, result, divisor, denominator if divides else None)
    return result, denominator


def _grad(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    grad_grad: Tensor | None,
    denominator: Tensor | None,
    loss: str,
    with_respect_to: str,
    divisor: int,
    threshold: float = 1.0,
) -> Tensor:
    if with_respect_to.endswith("target") and target is not None:
        return strided.empty_like(target)
    return strided.empty_like(input)


@binding.library_op(
    "elementwise_loss_backward(Tensor grad_output, Tensor input, Tensor? target, Tensor? weight, "
    "Tensor? pos_weight, Tensor? grad_grad, Tensor? denominator, str loss, str with_respect_to, "
    "SymInt divisor, float threshold=1.0) -> Tensor",
    fake=_grad,
)
def elementwise_loss_backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    grad_grad: Tensor | None,
    denominator: Tensor | None,
    loss: str,
    with_respect_to: str,
    divisor: int,
    threshold: float = 1.0,
) -> Tensor:
    """One gradient, from that of each element's loss; no target is a target of zeros.

    `grad_grad` is the gradient of such a gradient, and `with_respect_to` then names both variables:
    "input/target" is the gradient of the target, of the gradient of the input.
    """
    grad = _grad(
        grad_output,
        input,
        target,
        weight,
        pos_weight,
        grad_grad,
        denominator,
        loss,
        with_respect_to,
        divisor,
    )
    weights = (_expand(weight, input), _expand(pos_weight, input))
    operands = (input, target, *weights, grad_output, grad_grad)
    _launch(
        kernels.elementwise_loss_backward_kernel,
        (*operands, denominator, grad),
        (*operands, grad),
        (divisor,),
        threshold,
        LOSS=loss,
        WITH_RESPECT_TO=with_respect_to,
        ONE_GRAD_LOSS=is_one_element(grad_output.shape, grad_output.stride()),
    )
    return grad


def _expand(weight: Tensor | None, input: Tensor) -> Tensor | None:
    return None if weight is None else weight.expand(input.shape)


def _launch(
    kernel: Any,
    pointers: Sequence[Tensor | None],
    walked: Sequence[Tensor | None],
    divisor: tuple[int, ...],
    threshold: float,
    **constants: Any,
) -> None:
    """Launches over the elements of `walked`, whose last is written and decides the order."""
    input = pointers[0]
    assert input is not None
    strides = [None if tensor is None else tensor.stride() for tensor in walked]
    run = _plan(kernel, tuple(constants.items()), divisor, input.shape, *strides)
    run(input, *pointers, floats=(threshold,))


@launch.planned_by_kernel
def _plan(
    kernel: Any,
    constants: tuple[tuple[str, Any], ...],
    divisor: tuple[int, ...],
    shape: tuple[int, ...],
    *walked: tuple[int, ...] | None,
) -> launch.Prepared:
    ranked = [len(walked) - 1, *range(len(walked) - 1)]
    present = {place: found for place in reversed(ranked) if (found := walked[place]) is not None}
    nest = strided.nest_of("loss", shape, *present.values())
    strides = dict(zip(present, nest.strides, strict=True))
    along = (stride for i in range(len(walked)) for stride in strides.get(i, _NO_STRIDES))
    return launch.Prepared(
        kernel,
        (math.ceil(nest.numel / kernels.BLOCK),),
        (nest.numel, *divisor, *nest.sizes[1:], *along),
        kernels.ELEMENTWISE_CONFIG,
        INDEX_64=nest.wide,
        **dict(constants),
    )


def total(partial: Tensor, loss: Tensor, divisor: int, denominator: Tensor | None) -> None:
    """Adds `partial` (1 or 2, programs) in a fixed order and writes the reduced loss.

    The second row are sums of weights: they are added into `denominator`, which then divides the
    loss instead of `divisor`.
    """
    while True:
        rows, count = partial.shape
        run = _plan_total(count, divisor, denominator is not None)
        is_last = run.grid == (1,)
        sums = loss if is_last else partial.new_empty((rows, *run.grid))
        run(loss, partial, sums, denominator)
        if is_last:
            return
        partial = sums


@launch.planned
def _plan_total(count: int, divisor: int, has_weights: bool) -> launch.Prepared:
    programs = max(1, math.ceil(count / kernels.TOTAL_BLOCK))
    return launch.Prepared(
        kernels.loss_total_kernel,
        (programs,),
        (count, divisor),
        HAS_WEIGHTS=has_weights,
        FINAL=programs == 1,
        BLOCK=kernels.TOTAL_BLOCK,
        num_warps=8,
    )


def is_one_element(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether all indices reach the same element: the gradient that a sum or a mean sends back."""
    return all(stride == 0 or size == 1 for size, stride in zip(shape, strides, strict=True))


def check_reduction(op: str, reduction: str) -> None:
    """ValueError unless torch knows the reduction."""
    if reduction not in _REDUCTIONS:
        checks.fail(ValueError, op, "reduction must be 'none', 'mean' or 'sum'", received=reduction)


def _check_probabilities(input: Tensor, target: Tensor) -> None:
    # on a GPU it would wait for the values: there the kernels turn such a loss into NaN
    if input.is_cuda or not backend.INTERPRETING:
        return
    for name, tensor in (("input", input), ("target", target)):
        if not bool(((tensor >= 0) & (tensor <= 1)).all()):
            checks.fail(
                RuntimeError,
                "binary_cross_entropy",
                f"all elements of {name} must be between 0 and 1",
                **{name: tensor},
            )


def broadcast(op: str, input: Tensor, target: Tensor, weight: Tensor | None) -> torch.Size:
    """The shape of the losses; RuntimeError or ValueError where torch has none."""
    sizes = zip(reversed(input.shape), reversed(target.shape), strict=False)
    if any(a != b and 1 not in (a, b) for a, b in sizes):
        checks.fail(RuntimeError, op, "shapes do not broadcast", input=input, target=target)
    if weight is not None and weight.shape != input.shape:
        checks.fail(
            ValueError, op, "weight must have the input's shape", weight=weight, input=input
        )
    shape: torch.Size = torch.broadcast_shapes(input.shape, target.shape)
    return shape


def expanded(input: Tensor, target: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Both in the shape of the losses, with torch's warning where one had another."""
    if input.shape == target.shape:
        return input, target
    # a warning would break the graph of a compiled caller
    if not torch.compiler.is_compiling():
        checks.warn(
            f"Using a target size ({target.shape}) that is different to the input size "
            f"({input.shape}). This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size."
        )
    return input.expand(shape), target.expand(shape)


def declined_weight(input: Tensor, weight: Tensor | None, shape: torch.Size) -> str | None:
    """Why the kernels do not take the weight."""
    if weight is None:
        return None
    if weight.requires_grad and torch.is_grad_enabled():
        return "a weight that requires a gradient"
    # torch then adds each weight once, and each loss as often as it is broadcast
    return "a weighted input that broadcasts" if shape != input.shape else None


def promote(*tensors: Tensor | None) -> tuple[Any, ...]:
    """In the dtype that they promote to, if it is a floating-point one."""
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors if t is not None))
    if not dtype.is_floating_point:
        return tensors
    return tuple(tensor if tensor is None else tensor.to(dtype) for tensor in tensors)


def declined(input: Tensor, *others: Tensor | None) -> str | None:
    """Why the elementwise kernels do not take these tensors."""
    device, dims = input.device, input.dim()
    for other in others:
        if other is None:
            continue
        if other.device != device:
            return "tensors on different devices"
        if other.layout != torch.strided:
            return f"layout {other.layout}"
        if other.dtype.is_complex:
            return f"dtype {other.dtype}"
        dims = max(dims, other.dim())
    return f"{dims} dimensions" if dims > strided.RANK else None


def elementwise_cost(
    flops: int, operands: Sequence[Tensor | None], reduction: str
) -> dict[str, Cost]:
    """Cost of one forward and of the gradient of the input, from operations per element."""
    input = operands[0]
    assert input is not None
    size = input.numel() * input.element_size()
    read = sum(t.numel() * t.element_size() for t in operands if t is not None)
    each = size if reduction == "none" else 0
    return {
        "forward": Cost(flops * input.numel(), read + each),
        "backward": Cost(flops * input.numel(), read + each + size),
    }
