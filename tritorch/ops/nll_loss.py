"""Negative log-likelihood: reference, launches and gradients, public function, declaration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import backend, binding, checks, launch
from tritorch.ops import classes, loss, strided
from tritorch.ops.reduce import accumulator_dtype
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register
from tritorch.repeats.decorator import repeated

kernels = launch.kernels("nll_loss")


def nll_loss_reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """-weight[target] * input at the target class."""
    # the gradient of torch's takes no other layout
    input = input.contiguous()
    return F.nll_loss(input, target, weight, ignore_index=ignore_index, reduction=reduction)


def _outputs(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    denominator: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """The losses, and the sum of the weights where the mean divides by it, else no element."""
    divides = reduction == "mean"
    return (
        input.new_empty(target.shape if reduction == "none" else ()),
        input.new_empty(() if divides else (0,), dtype=accumulator_dtype(input.dtype)),
    )


@binding.library_op(
    "nll_loss_forward(Tensor input, Tensor target, Tensor? weight, Tensor? denominator, "
    "int ignore_index, str reduction) -> (Tensor, Tensor)",
    fake=_outputs,
)
def _forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    denominator: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Losses and denominator; one that is given divides the losses, which are not reduced."""
    classes.check_range("nll_loss", input, target, ignore_index)
    result, total = _outputs(input, target, weight, denominator, ignore_index, reduction)
    reduced = reduction != "none"
    strides = (input.stride(), target.stride())
    of_classes = (1 if weight is None else weight.stride(0), ignore_index)
    run = _plan(kernels.nll_loss_forward_kernel, input.shape, strides, of_classes, reduced)
    partial = total.new_empty((2, *run.grid)) if reduced else result
    run(input, input, target, weight, denominator, partial)
    if reduced:
        divides = total.numel() == 1
        loss.total(partial if divides else partial[:1], result, 1, total if divides else None)
    return result, total


@launch.planned_by_kernel
def _plan(
    kernel: Any,
    shape: tuple[int, ...],
    tensors: tuple[tuple[int, ...], ...],
    of_classes: tuple[int, int],
    reduced: bool | None = None,
) -> launch.Prepared:
    """From the shape with classes, and strides of the tensors in the order of the kernel."""
    nest = classes.nest_of_rows("nll_loss", shape, tensors)
    strides: tuple[int, ...] = ()
    for tensor, along in zip(tensors, nest.strides, strict=True):
        strides += (tensor[1], *along) if len(tensor) == len(shape) else along
    constants = {} if reduced is None else {"REDUCED": reduced}
    return launch.Prepared(
        kernel,
        (math.ceil(nest.numel / kernels.BLOCK),),
        (nest.numel, shape[1], *nest.sizes[1:], *strides, *of_classes),
        INDEX_64=nest.wide,
        BLOCK=kernels.BLOCK,
        **constants,
    )


def _grad(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    denominator: Tensor | None,
    ignore_index: int,
) -> Tensor:
    return strided.empty_like(input)


@binding.library_op(
    "nll_loss_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, "
    "Tensor? denominator, int ignore_index) -> Tensor",
    fake=_grad,
)
def _backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    denominator: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """The gradient of the input, whose layout alone matters, from that of each row's loss."""
    grad = _grad(grad_output, input, target, weight, denominator, ignore_index).zero_()
    strides = (target.stride(), grad_output.stride(), grad.stride())
    of_classes = (1 if weight is None else weight.stride(0), ignore_index)
    run = _plan(kernels.nll_loss_backward_kernel, grad.shape, strides, of_classes)
    run(input, target, weight, grad_output, denominator, grad)
    return grad


class NllLoss(torch.autograd.Function):
    """Input (N, C, d1, ...), target (N, d1, ...)."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        reduction: str,
    ) -> Tensor:
        result: Tensor
        result, denominator = _forward(input, target, weight, None, ignore_index, reduction)
        divides = denominator.numel() == 1
        binding.save_for_backward(ctx, input, target, weight, denominator if divides else None)
        ctx.ignore_index = ignore_index
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, target, weight, denominator = ctx.saved_tensors
        grad = binding.apply(
            NllLossBackward,
            grad_output.expand(target.shape),
            input,
            target,
            weight,
            denominator,
            ctx.ignore_index,
        )
        return (grad, None, None, None, None)


class NllLossBackward(torch.autograd.Function):
    """Spreads one number of each row; its own gradient gathers them."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        denominator: Tensor | None,
        ignore_index: int,
    ) -> Tensor:
        ctx.save_for_backward(target, weight, denominator)
        ctx.ignore_index = ignore_index
        grad: Tensor = _backward(grad_output, input, target, weight, denominator, ignore_index)
        return grad

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_grad_output = None
        if ctx.needs_input_grad[0]:
            of_grad_output = binding.apply(NllLossRows, grad, *ctx.saved_tensors, ctx.ignore_index)
        # the gradient has no number of the input in it
        of_input = torch.zeros_like(grad) if ctx.needs_input_grad[1] else None
        return (of_grad_output, of_input, None, None, None, None)


class NllLossRows(torch.autograd.Function):
    """The loss of each row, divided by the denominator that there is."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        denominator: Tensor | None,
        ignore_index: int,
    ) -> Tensor:
        ctx.save_for_backward(input, target, weight, denominator)
        ctx.ignore_index = ignore_index
        rows: Tensor = _forward(input, target, weight, denominator, ignore_index, "none")[0]
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_input = binding.apply(NllLossBackward, grad, *ctx.saved_tensors, ctx.ignore_index)
        return (of_input, None, None, None, None)


@repeated
def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """-weight[target] * input at the target class: negative log-likelihood of log-probabilities.

    Args:
        input: (N, C), (N, C, d1, ...) or (C,), any strides; float32, float16, bfloat16 or float64
            for the kernels.
        target: classes in [0, C) of dtype int64, or uint8 if it is (N,), of the input's shape
            without C.
        weight: (C,), a factor of each class, of the input's dtype.
        ignore_index: the class whose losses are 0 and count in no mean.
        reduction: "none", "mean" or "sum"; a mean divides by the sum of the weights of the target
            classes.

    Returns:
        A scalar, or with "none" the target's shape, in the input's dtype (float32 under autocast).
        The mean of nothing is NaN.  On a GPU a class out of range makes its loss NaN and a gradient
        of its row, without waiting for the kernel.  The gradient has the order of dimensions of the
        input, where torch takes and writes contiguous ones alone.

    Raises:
        IndexError: a class out of range, on a CPU.
        RuntimeError: shapes or dtypes that do not fit, a weight that requires a gradient.
        ValueError: another number of targets than of inputs, an unknown reduction, an input of no
            dimension.

    Source: `torch.nn.functional.nll_loss`.
    """
    op = "nll_loss"
    checks.tensor(op, {"weight": weight}, input=input, target=target)
    if type(ignore_index) is not int:
        ignore_index = checks.integer(op, "ignore_index", ignore_index)
    loss.check_reduction(op, reduction)
    if input.dim() == 0:
        checks.fail(ValueError, op, "input must have a dimension of classes", input=input)
    classes.check_indices(op, input, target)
    classes.check_weight(op, input, weight, differentiable=False)
    x, w = binding.autocast_to_float32(input, weight)
    no_classes = "no classes" if classes.count_of(x) == 0 else None
    declined = no_classes or loss.declined(x, target, w)
    if not backend.runs_triton(op, x, declined=declined):
        return nll_loss_reference(x, target, w, ignore_index, reduction)
    if w is not None:
        checks.same_dtype_and_device(op, x, weight=w)
        # copying a rare strided one is cheaper than wide offsets for every class
        w = w.contiguous()
    y = target
    if input.dim() == 1:
        x, y = x[None], y.view(1)
    result: Tensor = binding.apply(NllLoss, x, y, w, ignore_index, reduction)
    return result[0] if input.dim() == 1 and reduction == "none" else result


def _samples(make: Maker) -> Iterator[Sample]:
    def sample(name: str, *shape: int, ignore_index: int = 1, **given: Any) -> Sample:
        rows = (shape[0], *shape[2:]) if len(shape) > 1 else ()
        num_classes = shape[min(1, len(shape) - 1)]
        arguments: dict[str, Any] = {"input": make(*shape)}
        arguments["target"] = make.classes(*rows, count=num_classes)
        weight = make(num_classes, low=0.5, high=2.0)
        arguments |= {"weight": weight, "ignore_index": ignore_index, "reduction": "mean"}
        return Sample(name, **arguments | given)

    yield sample("signals", 3, 4, 29, reduction="none", layouts=True)
    yield sample("images", 2, 5, 4, 7, layouts=True)
    yield sample("rows", 257, 5, weight=None, reduction="sum")
    yield sample("volume", 2, 3, 2, 3, 2)
    yield sample("unbatched", 7, reduction="none")
    for reduction in ("none", "mean", "sum"):
        yield sample(f"tiny-{reduction}", 3, 4, reduction=reduction, gradcheck=True)
        yield sample(f"empty-{reduction}", 0, 3, reduction=reduction)
        ignored = make.classes(3, count=1)
        yield sample(
            f"all-ignored-{reduction}", 3, 4, target=ignored, ignore_index=0, reduction=reduction
        )
    target = make.classes(4, count=3, dtype=torch.uint8)
    yield sample("bytes", 4, 3, target=target, reduction="sum")


def _workloads(make: Maker) -> Iterator[Sample]:
    yield Sample("imagenet", input=make.empty(4096, 1000), target=make.classes(4096, count=1000))
    images = make.empty(8, 21, 512, 512).to(memory_format=torch.channels_last)
    yield Sample(
        "images-channels-last",
        input=images,
        target=make.classes(8, 512, 512, count=21),
        weight=make.empty(21),
        reduction="none",
    )


def _rejects(make: Maker) -> Iterator[Reject]:
    x, y = make(4, 3), make.classes(4, count=3)
    rule = r"nll_loss: reduction must be 'none', 'mean' or 'sum' \(received 'max'\)"
    yield Reject("reduction", rule, input=x, target=y, reduction="max")
    rule = r"nll_loss: class indices must have shape \(4,\)"
    yield Reject("batch", rf"{rule}.*\(3,\) int64", input=x, target=y[:3])
    yield Reject("no-batch", rule, input=x, target=y[0])
    yield Reject("dims", rule, input=x, target=y[:, None])
    rule = r"class indices must have shape \(1,\).*\(2,\)"
    yield Reject("unbatched", rule, input=x[0], target=y[:2])
    yield Reject("no-classes", r"must have a dimension of classes", input=x[0, 0], target=y[0])
    rule = r"class indices must have shape \(2, 4, 5\).*\(2, 4, 4\)"
    target = make.classes(2, 4, 4, count=3)
    yield Reject("spatial", rule, input=make(2, 3, 4, 5), target=target)
    rule = r"class indices must be int64 or uint8 \(target \(4,\) int32"
    yield Reject("int32", rule, input=x, target=y.int())
    rule = r"class indices of images must be int64 \(target \(2, 4, 5\) uint8"
    target = make.classes(2, 4, 5, count=3, dtype=torch.uint8)
    yield Reject("bytes", rule, input=make(2, 3, 4, 5), target=target)
    rule = r"weight must have one element for each of 3 classes \(weight \(2,\)"
    yield Reject("weight", rule, input=x, target=y, weight=make(2))
    weight = make(3).requires_grad_()
    yield Reject(
        "weight-gradient", r"no gradient flows to weight", input=x, target=y, weight=weight
    )


def _cost(
    input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any
) -> dict[str, Cost]:
    rows = target.numel() * (target.element_size() + input.element_size())
    size = input.numel() * input.element_size()
    return {
        "forward": Cost(2 * target.numel(), rows),
        "backward": Cost(2 * target.numel(), rows + size),
    }


register(
    OpSpec(
        name="nll_loss",
        op=nll_loss,
        reference=nll_loss_reference,
        kernels=(
            "nll_loss.nll_loss_forward_kernel",
            "nll_loss.nll_loss_backward_kernel",
            "loss.loss_total_kernel",
        ),
        gradients=("input",),
        samples=_samples,
        workloads=_workloads,
        rejects=_rejects,
        cost=_cost,
        accuracy="composite",
        source="torch.nn.functional.nll_loss",
        autocast="float32",
        layers=("NLLLoss",),
    )
)
