"""Binary cross-entropy of probabilities and of logits: references, declarations."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import backend, binding, checks
from tritorch.ops import loss
from tritorch.ops.loss_function import ElementwiseLoss
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register
from tritorch.repeats.decorator import repeated


def binary_cross_entropy_reference(
    input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """-weight * (target * log(input) + (1 - target) * log(1 - input)), each log at least -100."""
    return F.binary_cross_entropy(input, target, weight, reduction=reduction)


def binary_cross_entropy_with_logits_reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """The same of sigmoid(input), pos_weight times the part of the positive targets."""
    return F.binary_cross_entropy_with_logits(
        input, target, weight, reduction=reduction, pos_weight=pos_weight
    )


@repeated
def binary_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """-weight * (target * log(input) + (1 - target) * log(1 - input)), its mean or its sum.

    A logarithm is at least -100, the gradient (input - target) / max(input * (1 - input), 1e-12).

    Args:
        input: probabilities, any shape and strides; float32, float16, bfloat16 or float64.
        target: probabilities, of the input's shape and dtype.
        weight: broadcasts to the input.
        reduction: "none", "mean" or "sum"; a mean divides by the number of elements.

    Returns:
        A scalar, or with "none" the input's shape and order of dimensions, in the input's dtype
        (float32 under autocast of the CPU).  On a GPU a value outside [0, 1] makes its loss and its
        gradient NaN, without waiting for the kernel.

    Raises:
        RuntimeError: different dtypes, a weight that does not broadcast or requires a gradient,
            autocast of a GPU, and on a CPU a value outside [0, 1].
        ValueError: different shapes, an unknown reduction.

    Source: `torch.nn.functional.binary_cross_entropy`.
    """
    op = "binary_cross_entropy"
    _check(op, input, target, reduction, weight=weight)
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        checks.fail(
            RuntimeError,
            op,
            "unsafe under autocast: use binary_cross_entropy_with_logits",
            input=input,
        )
    x, y, w = binding.autocast_to_float32(input, target, weight)
    if x.dtype != y.dtype:
        checks.fail(
            RuntimeError, op, "target must have the input's dtype", input=input, target=target
        )
    if not backend.runs_triton(op, x, y, declined=loss.declined(x, y, w)):
        return binary_cross_entropy_reference(input, target, weight, reduction)
    result: Tensor = binding.apply(ElementwiseLoss, x, y, w, None, op, reduction, 1.0)
    return result


@repeated
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy of sigmoid(input), without overflow and without cancellation.

    Args:
        input: logits, any shape and strides; float32, float16, bfloat16 or float64.
        target: probabilities, of the input's shape and dtype for the kernels; values outside [0, 1]
            are taken as they are.
        weight: broadcasts to the input.
        reduction: "none", "mean" or "sum"; a mean divides by the number of elements.
        pos_weight: broadcasts to the input; factor of the part of the positive targets.

    Returns:
        A scalar, or with "none" the input's shape and order of dimensions, in the input's dtype
        (float32 under autocast).

    Raises:
        RuntimeError: weights that do not broadcast or require a gradient.
        ValueError: different shapes, an unknown reduction.

    Source: `torch.nn.functional.binary_cross_entropy_with_logits`.
    """
    op = "binary_cross_entropy_with_logits"
    _check(op, input, target, reduction, weight=weight, pos_weight=pos_weight)
    x, y, w, p = binding.autocast_to_float32(input, target, weight, pos_weight)
    # torch writes into a tensor of the target's dtype, which need not be what they promote to
    declined = "different dtypes" if x.dtype != y.dtype else None
    # it does not subtract from bools
    if p is not None and p.dtype == torch.bool:
        declined = "dtype bool"
    if not backend.runs_triton(op, x, y, declined=declined or loss.declined(x, y, w, p)):
        return binary_cross_entropy_with_logits_reference(
            input, target, weight, reduction, pos_weight
        )
    result: Tensor = binding.apply(ElementwiseLoss, x, y, w, p, op, reduction, 1.0)
    return result


def _check(
    op: str, input: Tensor, target: Tensor, reduction: str, **weights: Tensor | None
) -> None:
    checks.tensor(op, weights, input=input, target=target)
    loss.check_reduction(op, reduction)
    if target.shape != input.shape:
        checks.fail(
            ValueError, op, "target must have the input's shape", target=target, input=input
        )
    for name, weight in weights.items():
        if weight is None:
            continue
        sizes = zip(reversed(weight.shape), reversed(input.shape), strict=False)
        if weight.dim() > input.dim() or any(a != 1 and a != b for a, b in sizes):
            checks.fail(
                RuntimeError,
                op,
                f"{name} must broadcast to the input's shape",
                **{name: weight},
                input=input,
            )
        if weight.requires_grad and torch.is_grad_enabled():
            checks.fail(RuntimeError, op, f"no gradient flows to {name}", **{name: weight})


def _samples(make: Maker, *, logits: bool) -> Iterator[Sample]:
    def values(*shape: int) -> Tensor:
        return make(*shape, scale=3.0) if logits else probabilities(*shape)

    def probabilities(*shape: int) -> Tensor:
        return make(*shape, low=0.05, high=0.95)

    def sample(
        name: str,
        *shape: int,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        **options: Any,
    ) -> Sample:
        if logits:
            options["pos_weight"] = pos_weight
        return Sample(
            name, input=values(*shape), target=probabilities(*shape), weight=weight, **options
        )

    def weights(*shape: int) -> Tensor:
        return make(*shape, low=0.5, high=2.0)

    yield sample(
        "images", *(3, 4, 5, 7), weight=weights(3, 1, 5, 1), reduction="none", layouts=True
    )
    yield sample("rows", *(33, 35), pos_weight=weights(35), reduction="mean", layouts=True)
    if not logits:
        # whose logarithms are bounded
        certain = probabilities(4, 9).round()
        yield Sample("certain", input=certain, target=probabilities(4, 9), reduction="none")
    for reduction in ("none", "mean", "sum"):
        yield sample(f"one-{reduction}", 1, reduction=reduction)
        yield sample(f"scalar-{reduction}", reduction=reduction)
        yield sample(f"empty-{reduction}", 0, 3, reduction=reduction)
        yield sample(
            f"block+1-{reduction}",
            *(205, 5),
            weight=weights(205, 1),
            pos_weight=weights(5),
            reduction=reduction,
        )
        yield sample(
            f"tiny-{reduction}",
            *(2, 3),
            weight=weights(3) if reduction != "none" else None,
            pos_weight=weights(3) if reduction != "mean" else None,
            reduction=reduction,
            gradcheck=True,
        )


def _workloads(make: Maker, *, logits: bool) -> Iterator[Sample]:
    images = make.empty(8, 1, 512, 512)
    pairs = (
        ("8192x80", make.empty(8192, 80), make.empty(8192, 80), make.empty(80)),
        ("masks", images, make.empty(8, 1, 512, 512), None),
        (
            "images-channels-last",
            make.empty(8, 19, 128, 128).to(memory_format=torch.channels_last),
            make.empty(8, 19, 128, 128),
            make.empty(19, 1, 1),
        ),
        ("odd", make.empty(1023, 1021), make.empty(1023, 1021), None),
    )
    for name, input, target, weight in pairs:
        extra: dict[str, Any] = {"pos_weight": weight} if logits else {}
        reduction = "none" if name == "odd" else "mean"
        yield Sample(name, input=input, target=target, weight=weight, reduction=reduction, **extra)


def _rejects(make: Maker, *, logits: bool) -> Iterator[Reject]:
    x = make(2, 3, low=0.1, high=0.9)
    yield Reject(
        "reduction",
        r"reduction must be 'none', 'mean' or 'sum' \(received 'max'\)",
        input=x,
        target=x,
        reduction="max",
    )
    yield Reject("shape", r"target must have the input's shape.*\(1, 3\)", input=x, target=x[:1])
    yield Reject(
        "weight-shape",
        r"weight must broadcast to the input's shape.*\(2,\)",
        input=x,
        target=x,
        weight=make(2),
    )
    yield Reject(
        "weight-dims",
        r"weight must broadcast to the input's shape.*\(4, 2, 3\)",
        input=x,
        target=x,
        weight=make(4, 2, 3),
    )
    yield Reject(
        "weight-gradient",
        r"no gradient flows to weight",
        input=x,
        target=x,
        weight=make(3).requires_grad_(),
    )
    if logits:
        yield Reject(
            "pos-weight-shape",
            r"pos_weight must broadcast to the input's shape.*\(2,\)",
            input=x,
            target=x,
            pos_weight=make(2),
        )
        yield Reject(
            "pos-weight-gradient",
            r"no gradient flows to pos_weight",
            input=x,
            target=x,
            pos_weight=make(3).requires_grad_(),
        )
    else:
        yield Reject(
            "dtype",
            r"target must have the input's dtype.*float32.*float64",
            input=x,
            target=x.double(),
        )


def _cost(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> dict[str, Cost]:
    return loss.elementwise_cost(8, (input, target, weight, pos_weight), reduction)


register(
    OpSpec(
        name="binary_cross_entropy",
        op=binary_cross_entropy,
        reference=binary_cross_entropy_reference,
        kernels=loss.KERNELS,
        gradients=("input", "target"),
        samples=functools.partial(_samples, logits=False),
        workloads=functools.partial(_workloads, logits=False),
        rejects=functools.partial(_rejects, logits=False),
        cost=_cost,
        accuracy="composite",
        source="torch.nn.functional.binary_cross_entropy",
        autocast="float32",
        # what is no probability is refused, or made NaN
        non_finite=(),
        layers=("BCELoss",),
    )
)

register(
    OpSpec(
        name="binary_cross_entropy_with_logits",
        op=binary_cross_entropy_with_logits,
        reference=binary_cross_entropy_with_logits_reference,
        kernels=loss.KERNELS,
        gradients=("input", "target"),
        samples=functools.partial(_samples, logits=True),
        workloads=functools.partial(_workloads, logits=True),
        rejects=functools.partial(_rejects, logits=True),
        cost=_cost,
        accuracy="composite",
        source="torch.nn.functional.binary_cross_entropy_with_logits",
        autocast="float32",
        # its losses are laid out as the input, torch's as one of the intermediate results
        keeps_format=False,
        layers=("BCEWithLogitsLoss",),
    )
)
