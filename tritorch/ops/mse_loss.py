"""Mean squared error: reference, gradients, public function, declaration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import backend, binding, checks
from tritorch.ops import loss
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register
from tritorch.repeats.decorator import repeated


def mse_loss_reference(
    input: Tensor, target: Tensor, reduction: str = "mean", weight: Tensor | None = None
) -> Tensor:
    """(input - target)^2 times the weight; the weighted mean divides by the sum of the weights."""
    # torch's stub does not know of the weight
    return F.mse_loss(input, target, reduction=reduction, weight=weight)  # type: ignore[call-arg]


class MseLoss(torch.autograd.Function):
    """Input and target have one shape and dtype, the weight also has that shape."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str
    ) -> Tensor:
        result: Tensor
        result, denominator = loss.elementwise_loss_forward(
            input, target, weight, None, "mse_loss", reduction
        )
        ctx.divisor = input.numel() if reduction == "mean" and weight is None else 1
        binding.save_for_backward(
            ctx, input, target, weight, denominator if denominator.numel() == 1 else None
        )
        return result

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
        wanted: loss.Wanted,
        divisor: int,
    ) -> Tensor:
        ctx.save_for_backward(grad_output, input, target, weight, denominator)
        ctx.wanted, ctx.divisor = wanted, divisor
        grad: Tensor = loss.elementwise_loss_backward(
            grad_output, input, target, weight, None, None, denominator, "mse_loss", wanted, divisor
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


@repeated
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
    checks.tensor("mse_loss", {"weight": weight}, input=input, target=target)
    loss.check_reduction("mse_loss", reduction)
    shape = loss.broadcast("mse_loss", input, target, weight)
    x, y, w = loss.promote(*binding.autocast_to_float32(input, target, weight))
    declined = loss.declined_weight(x, w, shape) or loss.declined(x, y, w)
    if not backend.runs_triton("mse_loss", x, y, w, declined=declined):
        return mse_loss_reference(input, target, reduction, weight)
    x, y = loss.expanded(x, y, shape)
    result: Tensor = binding.apply(MseLoss, x, y, w, reduction)
    return result


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
    return loss.elementwise_cost(3, (input, target, weight), reduction)


register(
    OpSpec(
        name="mse_loss",
        op=mse_loss,
        reference=mse_loss_reference,
        kernels=loss.KERNELS,
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
