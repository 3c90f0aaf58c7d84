"""Mean squared error, and what it shares with the other losses: launches, sums, checks."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import backend, binding, checks, launch
from tritorch.ops import strided
from tritorch.ops.reduce import accumulator_dtype
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register

kernels = launch.kernels("loss")

KERNELS = (
    "loss.elementwise_loss_forward_kernel",
    "loss.elementwise_loss_backward_kernel",
    "loss.loss_total_kernel",
)

_NO_STRIDES = (0,) * strided.RANK
_REDUCTIONS = ("none", "mean", "sum")

Wanted = Literal["input", "target"]


def mse_loss_reference(
    input: Tensor, target: Tensor, reduction: str = "mean", weight: Tensor | None = None
) -> Tensor:
    """(input - target)^2 times the weight; the weighted mean divides by the sum of the weights."""
    # torch's stub does not know of the weight
    return F.mse_loss(input, target, reduction=reduction, weight=weight)  # type: ignore[call-arg]


def _outputs(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    loss: str,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """The losses, and the sum of the weights where the mean divides by it, else no element."""
    result = strided.empty_like(input) if reduction == "none" else input.new_empty(())
    # the mean of the other losses divides by the number of elements, whatever their weights
    divides = loss == "mse_loss" and reduction == "mean" and weight is not None
    shape = () if divides else (0,)
    return result, input.new_empty(shape, dtype=accumulator_dtype(input.dtype))


@binding.library_op(
    "elementwise_loss_forward(Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, "
    "str loss, str reduction) -> (Tensor, Tensor)",
    fake=_outputs,
)
def elementwise_loss_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    loss: str,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Losses and denominator; weights broadcast, the target has the input's shape and dtype."""
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
        (),
        (*operands, None if reduced else result),
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
    denominator: Tensor | None,
    loss: str,
    with_respect_to: str,
    divisor: int,
) -> Tensor:
    if with_respect_to == "target" and target is not None:
        return strided.empty_like(target)
    return strided.empty_like(input)


@binding.library_op(
    "elementwise_loss_backward(Tensor grad_output, Tensor input, Tensor? target, Tensor? weight, "
    "Tensor? pos_weight, Tensor? denominator, str loss, str with_respect_to, SymInt divisor)"
    " -> Tensor",
    fake=_grad,
)
def elementwise_loss_backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    denominator: Tensor | None,
    loss: str,
    with_respect_to: str,
    divisor: int,
) -> Tensor:
    """One gradient, from that of each element's loss; no target is a target of zeros."""
    grad = _grad(
        grad_output, input, target, weight, pos_weight, denominator, loss, with_respect_to, divisor
    )
    operands = (input, target, _expand(weight, input), _expand(pos_weight, input), grad_output)
    _launch(
        kernels.elementwise_loss_backward_kernel,
        (*operands, denominator, grad),
        (divisor,),
        (*operands, grad),
        LOSS=loss,
        WITH_RESPECT_TO=with_respect_to,
        ONE_GRAD_LOSS=is_one_element(grad_output),
    )
    return grad


def _expand(weight: Tensor | None, input: Tensor) -> Tensor | None:
    return None if weight is None else weight.expand(input.shape)


def _launch(
    kernel: Any,
    pointers: Sequence[Tensor | None],
    sizes: Sequence[int],
    walked: Sequence[Tensor | None],
    **constants: Any,
) -> None:
    """Launches over the elements of `walked`, whose last is written and decides the order."""
    input = pointers[0]
    assert input is not None
    ranked = [len(walked) - 1, *range(len(walked) - 1)]
    present = [place for place in reversed(ranked) if walked[place] is not None]
    nest = strided.nest("loss", *(t for place in present if (t := walked[place]) is not None))
    strides = dict(zip(present, nest.strides, strict=True))
    launch.run(
        kernel,
        (math.ceil(nest.numel / kernels.BLOCK),),
        *pointers,
        nest.numel,
        *sizes,
        *nest.sizes[1:],
        *(stride for place in range(len(walked)) for stride in strides.get(place, _NO_STRIDES)),
        on=input,
        INDEX_64=nest.wide,
        BLOCK=kernels.BLOCK,
        **constants,
    )


def total(partial: Tensor, loss: Tensor, divisor: int, denominator: Tensor | None) -> None:
    """Adds `partial` (1 or 2, programs) in a fixed order and writes the reduced loss.

    The second row are sums of weights: they are added into `denominator`, which then divides the
    loss instead of `divisor`.
    """
    while True:
        rows, count = partial.shape
        programs = max(1, math.ceil(count / kernels.TOTAL_BLOCK))
        sums = loss if programs == 1 else partial.new_empty((rows, programs))
        launch.run(
            kernels.loss_total_kernel,
            (programs,),
            partial,
            sums,
            denominator,
            count,
            divisor,
            on=loss,
            HAS_WEIGHTS=denominator is not None,
            FINAL=programs == 1,
            BLOCK=kernels.TOTAL_BLOCK,
            num_warps=8,
        )
        if programs == 1:
            return
        partial = sums


def is_one_element(tensor: Tensor) -> bool:
    """Whether all indices reach the same element: the gradient that a sum or a mean sends back."""
    return all(
        stride == 0 or size == 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


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


def refuse_double_backward(op: str) -> NoReturn:
    """NotImplementedError: the gradient of the loss has no gradient of its own."""
    checks.fail(
        NotImplementedError, op, "its gradient is differentiable no more (once_differentiable)"
    )


def declined(*tensors: Tensor | None) -> str | None:
    """Why the elementwise kernels do not take these tensors."""
    given = [tensor for tensor in tensors if tensor is not None]
    if len({tensor.device for tensor in given}) > 1:
        return "tensors on different devices"
    dims = max(tensor.dim() for tensor in given)
    return f"{dims} dimensions" if dims > strided.RANK else None


class MseLoss(torch.autograd.Function):
    """Input and target have one shape and dtype, the weight also has that shape."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str
    ) -> Tensor:
        loss: Tensor
        loss, denominator = elementwise_loss_forward(
            input, target, weight, None, "mse_loss", reduction
        )
        ctx.divisor = input.numel() if reduction == "mean" and weight is None else 1
        ctx.save_for_backward(
            input, target, weight, denominator if denominator.numel() == 1 else None
        )
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        input, target, weight, denominator = ctx.saved_tensors
        grad_input, grad_target = (
            binding.apply(
                MseLossBackward,
                grad_output.expand(input.shape),
                input,
                target,
                weight,
                denominator,
                wanted,
                ctx.divisor,
            )
            if needed
            else None
            for needed, wanted in zip(ctx.needs_input_grad, ("input", "target"), strict=False)
        )
        return grad_input, grad_target, None, None


class MseLossBackward(torch.autograd.Function):
    """grad_output * (input - target) * constants: linear in each, so its gradients are itself."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        input: Tensor,
        target: Tensor | None,
        weight: Tensor | None,
        denominator: Tensor | None,
        wanted: Wanted,
        divisor: int,
    ) -> Tensor:
        ctx.save_for_backward(grad_output, input, target, weight, denominator)
        ctx.wanted, ctx.divisor = wanted, divisor
        grad: Tensor = elementwise_loss_backward(
            grad_output, input, target, weight, None, denominator, "mse_loss", wanted, divisor
        )
        return grad

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, input, target, weight, denominator = ctx.saved_tensors
        opposite = "target" if ctx.wanted == "input" else "input"
        # grad takes the place of the factor that the gradient is of
        factors = (
            (grad, input, target, ctx.wanted),
            (grad_output, grad, None, ctx.wanted),
            (grad_output, grad, None, opposite),
        )
        grads = [
            binding.apply(
                MseLossBackward, first, second, third, weight, denominator, wanted, ctx.divisor
            )
            if needed
            else None
            for needed, (first, second, third, wanted) in zip(
                ctx.needs_input_grad, factors, strict=False
            )
        ]
        return (*grads, None, None, None, None)


def mse_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", weight: Tensor | None = None
) -> Tensor:
    """(input - target)^2 times the weight, its mean or its sum.

    Args:
        input: any shape and strides; with the target it promotes to float32, float16, bfloat16 or
            float64 for the kernels.
        target: broadcasts with the input, with torch's warning where their shapes differ.
        reduction: "none", "mean" or "sum".
        weight: the input's shape; a mean then divides by the sum of the weights.

    Returns:
        A scalar, or with "none" the broadcast shape in the input's order of dimensions, of the
        dtype that the arguments promote to (float32 under autocast).  The mean of nothing is NaN,
        its sum 0.  Sums are kept in float32 (float64 for float64).  Each gradient has the order of
        dimensions of its argument, where torch writes contiguous ones.

    Raises:
        RuntimeError: shapes that do not broadcast.
        ValueError: an unknown reduction, a weight of another shape than the input.

    Source: `torch.nn.functional.mse_loss`.
    """
    checks.tensor("mse_loss", input=input, target=target)
    check_reduction("mse_loss", reduction)
    shape = _broadcast(input, target, weight)
    x, y, w = _promote(*binding.autocast_to_float32(input, target, weight))
    if not backend.runs_triton("mse_loss", x, y, w, declined=_declined(x, y, w, shape)):
        return mse_loss_reference(input, target, reduction, weight)
    if x.shape != y.shape:
        checks.warn(
            f"Using a target size ({target.shape}) that is different to the input size "
            f"({input.shape}). This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size."
        )
        x, y = x.expand(shape), y.expand(shape)
    loss: Tensor = binding.apply(MseLoss, x, y, w, reduction)
    return loss


def _promote(*tensors: Tensor | None) -> tuple[Any, ...]:
    """In the dtype that they promote to, if it is a floating-point one."""
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors if t is not None))
    if not dtype.is_floating_point:
        return tensors
    return tuple(tensor if tensor is None else tensor.to(dtype) for tensor in tensors)


def _broadcast(input: Tensor, target: Tensor, weight: Tensor | None) -> torch.Size:
    sizes = zip(reversed(input.shape), reversed(target.shape), strict=False)
    if any(a != b and 1 not in (a, b) for a, b in sizes):
        checks.fail(RuntimeError, "mse_loss", "shapes do not broadcast", input=input, target=target)
    if weight is not None and weight.shape != input.shape:
        checks.fail(
            ValueError, "mse_loss", "weight must have the input's shape", weight=weight, input=input
        )
    shape: torch.Size = torch.broadcast_shapes(input.shape, target.shape)  # type: ignore[no-untyped-call]
    return shape


def _declined(
    input: Tensor, target: Tensor, weight: Tensor | None, shape: torch.Size
) -> str | None:
    if weight is not None:
        if weight.requires_grad and torch.is_grad_enabled():
            return "a weight that requires a gradient"
        if shape != input.shape:
            # torch then adds each weight once, and each loss as often as it is broadcast
            return "a weighted input that broadcasts"
    return declined(input, target, weight)


def _samples(make: Maker) -> Iterator[Sample]:
    yield Sample(
        "rows", input=make(33, 35), target=make(33, 35), reduction="mean", weight=None, layouts=True
    )
    yield Sample(
        "images",
        input=make(2, 3, 5, 7),
        target=make(2, 3, 5, 7),
        reduction="none",
        weight=make(2, 3, 5, 7, low=0.5, high=2.0),
        layouts=True,
    )
    for name, shape in (("one", (1,)), ("scalar", ()), ("empty", (0, 3)), ("block+1", (1025,))):
        for reduction in ("none", "mean", "sum"):
            yield Sample(
                f"{name}-{reduction}",
                input=make(*shape),
                target=make(*shape),
                reduction=reduction,
                weight=None,
            )
    yield Sample(
        "weighted-mean",
        input=make(9, 130),
        target=make(9, 130),
        reduction="mean",
        weight=make(9, 130, low=0.5, high=2.0),
    )
    for reduction in ("none", "mean", "sum"):
        yield Sample(
            f"tiny-{reduction}",
            input=make(2, 3),
            target=make(2, 3),
            reduction=reduction,
            weight=make(2, 3, low=0.5, high=2.0) if reduction == "mean" else None,
            gradcheck=True,
        )


def _workloads(make: Maker) -> Iterator[Sample]:
    for reduction in ("mean", "none"):
        yield Sample(
            f"4096x1024-{reduction}",
            input=make.empty(4096, 1024),
            target=make.empty(4096, 1024),
            reduction=reduction,
            weight=None,
        )
    images = make.empty(32, 3, 224, 224).to(memory_format=torch.channels_last)
    yield Sample(
        "images-channels-last",
        input=images,
        target=make.empty(32, 3, 224, 224),
        reduction="mean",
        weight=make.empty(32, 3, 224, 224),
    )
    yield Sample(
        "odd",
        input=make.empty(1023, 1021),
        target=make.empty(1023, 1021),
        reduction="sum",
        weight=None,
    )


def _rejects(make: Maker) -> Iterator[Reject]:
    x = make(2, 3)
    yield Reject(
        "reduction",
        r"mse_loss: reduction must be .*'none', 'mean' or 'sum'.*'max'",
        input=x,
        target=x,
        reduction="max",
    )
    yield Reject(
        "weight",
        r"mse_loss: weight must have the input's shape.*\(3,\)",
        input=x,
        target=x,
        weight=make(3),
    )
    yield Reject(
        "not-a-tensor", r"mse_loss: target must be a Tensor", input=x, target=1.0, raises=TypeError
    )


def _cost(
    input: Tensor, target: Tensor, reduction: str = "mean", weight: Tensor | None = None
) -> dict[str, Cost]:
    return elementwise_cost(3, (input, target, weight), reduction)


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


register(
    OpSpec(
        name="mse_loss",
        op=mse_loss,
        reference=mse_loss_reference,
        kernels=KERNELS,
        gradients=("input", "target"),
        samples=_samples,
        workloads=_workloads,
        rejects=_rejects,
        cost=_cost,
        accuracy="composite",
        source="torch.nn.functional.mse_loss",
        autocast="float32",
        non_finite=("input", "target"),
        layers=("MSELoss",),
    )
)
