"""Losses of the distance: l1, smooth l1 and Huber; references, public functions, declarations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import backend, binding, checks
from tritorch.ops import loss
from tritorch.ops.loss_function import ElementwiseLoss
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register
from tritorch.repeats.decorator import repeated


def l1_loss_reference(
    input: Tensor, target: Tensor, reduction: str = "mean", weight: Tensor | None = None
) -> Tensor:
    """|input - target| times the weight; the weighted mean divides by the sum of the weights."""
    # torch's stub does not know of the weight
    return F.l1_loss(input, target, reduction=reduction, weight=weight)  # type: ignore[call-arg]


def smooth_l1_loss_reference(
    input: Tensor, target: Tensor, reduction: str = "mean", beta: float = 1.0
) -> Tensor:
    """d^2 / (2 beta) of a distance d below beta, else d - beta / 2."""
    return F.smooth_l1_loss(input, target, reduction=reduction, beta=beta)


def huber_loss_reference(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """d^2 / 2 of a distance d below delta, else delta * (d - delta / 2), times the weight."""
    # torch's stub does not know of the weight
    return F.huber_loss(  # type: ignore[call-arg]
        input, target, reduction=reduction, delta=delta, weight=weight
    )


@repeated
def l1_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", weight: Tensor | None = None
) -> Tensor:
    """|input - target| times the weight, its mean or its sum.

    Args:
        input: any shape and strides; with the target it promotes to float32, float16, bfloat16 or
            float64 for the kernels.
        target: broadcasts with the input, with torch's warning where their shapes differ.
        reduction: "none", "mean" or "sum".
        weight: the input's shape; a mean then divides by the sum of the weights.

    Returns:
        A scalar, or with "none" the broadcast shape in the input's order of dimensions, of the
        dtype that the arguments promote to (float32 under autocast).  The mean of nothing is NaN,
        its sum 0.  Gradients are 0 where the distance is 0 or NaN.

    Raises:
        RuntimeError: shapes that do not broadcast.
        ValueError: an unknown reduction, a weight of another shape than the input.

    Source: `torch.nn.functional.l1_loss`.
    """
    op = "l1_loss"
    _check(op, input, target, reduction, weight)
    shape = loss.broadcast(op, input, target, weight)
    x, y, w = loss.promote(*binding.autocast_to_float32(input, target, weight))
    declined = _declined_bool(input, target)
    declined = declined or loss.declined_weight(x, w, shape) or loss.declined(x, y, w)
    if not backend.runs_triton(op, x, y, w, declined=declined):
        return l1_loss_reference(input, target, reduction, weight)
    x, y = loss.expanded(x, y, shape)
    result: Tensor = binding.apply(ElementwiseLoss, x, y, w, None, op, reduction, 1.0)
    return result


@repeated
def smooth_l1_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", beta: float = 1.0
) -> Tensor:
    """d^2 / (2 beta) of a distance d = |input - target| below beta, else d - beta / 2.

    Args:
        input: any shape and strides; with the target it promotes to float32, float16, bfloat16 or
            float64 for the kernels.
        target: broadcasts with the input, with torch's warning where their shapes differ.
        reduction: "none", "mean" or "sum".
        beta: the distance up to which the loss is a square; with 0 it is `l1_loss`.

    Returns:
        A scalar, or with "none" the broadcast shape in the input's order of dimensions, of the
        dtype that the arguments promote to (float32 under autocast).

    Raises:
        RuntimeError: shapes that do not broadcast, a negative beta.
        ValueError: an unknown reduction.

    Source: `torch.nn.functional.smooth_l1_loss`.
    """
    op = "smooth_l1_loss"
    _check(op, input, target, reduction)
    if type(beta) is not float:
        beta = checks.number(op, "beta", beta)
    # neither is NaN
    if not beta >= 0:
        checks.fail(RuntimeError, op, "beta must be at least 0", received=beta)
    shape = loss.broadcast(op, input, target, None)
    x, y = loss.promote(*binding.autocast_to_float32(input, target))
    declined = _declined_bool(input, target) if beta == 0 else None
    if not backend.runs_triton(op, x, y, declined=declined or loss.declined(x, y)):
        return smooth_l1_loss_reference(input, target, reduction, beta)
    x, y = loss.expanded(x, y, shape)
    name = op if beta > 0 else "l1_loss"
    result: Tensor = binding.apply(ElementwiseLoss, x, y, None, None, name, reduction, beta)
    return result


@repeated
def huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """d^2 / 2 of a distance d = |input - target| below delta, else delta * (d - delta / 2).

    Args:
        input: any shape and strides; float32, float16, bfloat16 or float64 for the kernels.
        target: broadcasts with the input, with torch's warning where their shapes differ; of the
            input's dtype for the kernels.
        reduction: "none", "mean" or "sum"; a mean divides by the number of losses.
        delta: the distance up to which the loss is a square.
        weight: the input's shape, and its dtype for the kernels; factor of each loss.

    Returns:
        A scalar, or with "none" the broadcast shape in the input's order of dimensions, in the
        input's dtype (float32 under autocast).

    Raises:
        RuntimeError: shapes that do not broadcast, a delta that is not above 0.
        ValueError: an unknown reduction, a weight of another shape than the input.

    Source: `torch.nn.functional.huber_loss`.
    """
    op = "huber_loss"
    _check(op, input, target, reduction, weight)
    if type(delta) is not float:
        delta = checks.number(op, "delta", delta)
    if not delta > 0:
        checks.fail(RuntimeError, op, "delta must be above 0", received=delta)
    shape = loss.broadcast(op, input, target, weight)
    x, y, w = binding.autocast_to_float32(input, target, weight)
    # torch writes into a tensor of the input's dtype, which need not be what they promote to
    mixed = x.dtype != y.dtype or (w is not None and w.dtype != x.dtype)
    declined = "different dtypes" if mixed else None
    declined = declined or loss.declined_weight(x, w, shape) or loss.declined(x, y, w)
    if not backend.runs_triton(op, x, y, w, declined=declined):
        return huber_loss_reference(input, target, reduction, delta, weight)
    x, y = loss.expanded(x, y, shape)
    result: Tensor = binding.apply(ElementwiseLoss, x, y, w, None, op, reduction, delta)
    return result


def _check(
    op: str, input: Tensor, target: Tensor, reduction: str, weight: Tensor | None = None
) -> None:
    checks.tensor(op, {"weight": weight}, input=input, target=target)
    loss.check_reduction(op, reduction)


def _declined_bool(*tensors: Tensor) -> str | None:
    # torch does not subtract from bools
    return "dtype bool" if any(t.dtype == torch.bool for t in tensors) else None


def _samples(make: Maker, *, option: str | None, weighted: bool) -> Iterator[Sample]:
    """`option`: the name of the distance where a square ends, if there is one."""

    def sample(name: str, *shape: int, reduction: str, weight: bool, **marks: bool) -> Sample:
        options: dict[str, Any] = {} if option is None else {option: 0.75}
        if weighted:
            options["weight"] = make(*shape, low=0.5, high=2.0) if weight else None
        options |= {"input": make(*shape), "target": make(*shape), "reduction": reduction}
        return Sample(name, **options, **marks)

    yield sample("rows", 33, 35, reduction="mean", weight=False, layouts=True)
    yield sample("images", 2, 3, 5, 7, reduction="none", weight=True, layouts=True)
    yield sample("block+1", 1025, reduction="mean", weight=True)
    yield sample("scalar", reduction="none", weight=False)
    yield sample("empty-mean", 0, 3, reduction="mean", weight=False)
    yield sample("empty-sum", 0, 3, reduction="sum", weight=False)
    yield sample("tiny-mean", 2, 3, reduction="mean", weight=True, gradcheck=True)
    yield sample("tiny-none", 2, 3, reduction="none", weight=False, gradcheck=True)


def _workloads(make: Maker) -> Iterator[Sample]:
    boxes = make.empty(65536, 80)
    yield Sample("boxes", input=boxes, target=make.empty(65536, 80), reduction="mean")
    images = make.empty(32, 3, 224, 224).to(memory_format=torch.channels_last)
    yield Sample(
        "images-channels-last",
        input=images,
        target=make.empty(32, 3, 224, 224),
        reduction="none",
    )


def _rejects(make: Maker, *, op: str, weighted: bool) -> Iterator[Reject]:
    x = make(2, 3)
    yield Reject(
        "reduction",
        rf"{op}: reduction must be 'none', 'mean' or 'sum' \(received 'max'\)",
        input=x,
        target=x,
        reduction="max",
    )
    # torch warns before it raises
    yield Reject(
        "shapes",
        rf"{op}: shapes do not broadcast.*\(2,\)",
        input=x,
        target=make(2),
        raises=RuntimeError,
    )
    if weighted:
        rule = rf"{op}: weight must have the input's shape.*\(3,\)"
        yield Reject("weight", rule, input=x, target=x, weight=make(3))
    if op == "smooth_l1_loss":
        rule = r"beta must be at least 0 \(received -0.5\)"
        yield Reject("beta", rule, input=x, target=x, beta=-0.5)
    if op == "huber_loss":
        rule = r"delta must be above 0 \(received 0.0\)"
        yield Reject("delta", rule, input=x, target=x, delta=0.0)


def _cost(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    weight: Tensor | None = None,
    *,
    flops: int,
    **options: Any,
) -> dict[str, Cost]:
    return loss.elementwise_cost(flops, (input, target, weight), reduction)


def _declare(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    layer: str,
    *,
    option: str | None,
    weighted: bool,
    flops: int,
) -> None:
    name = op.__name__
    register(
        OpSpec(
            name=name,
            op=op,
            reference=reference,
            kernels=loss.KERNELS,
            gradients=("input", "target"),
            samples=functools.partial(_samples, option=option, weighted=weighted),
            workloads=_workloads,
            rejects=functools.partial(_rejects, op=name, weighted=weighted),
            cost=functools.partial(_cost, flops=flops),
            accuracy="composite",
            source=f"torch.nn.functional.{name}",
            autocast="float32",
            non_finite=("input", "target"),
            layers=(layer,),
        )
    )


_declare(l1_loss, l1_loss_reference, "L1Loss", option=None, weighted=True, flops=2)
_declare(
    smooth_l1_loss,
    smooth_l1_loss_reference,
    "SmoothL1Loss",
    option="beta",
    weighted=False,
    flops=5,
)
_declare(huber_loss, huber_loss_reference, "HuberLoss", option="delta", weighted=True, flops=5)
