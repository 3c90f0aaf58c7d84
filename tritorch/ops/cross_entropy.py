"""Cross-entropy: reference, public function, declaration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import backend, binding, checks
from tritorch.ops import classes, cross_entropy_function, loss
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register
from tritorch.repeats.decorator import repeated


def cross_entropy_reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log_softmax(input), at the target class or in the mean over target probabilities."""
    return F.cross_entropy(
        input,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


@repeated
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log_softmax(input), at the target class or in the mean over target probabilities.

    One pass over any number of classes, with a running maximum.  For the gradient the input itself
    is kept, and must not be written until then; torch keeps its log_softmax, which takes as much
    memory again.

    Args:
        input: logits, (N, C), (N, C, d1, ...) or (C,), any strides; float32, float16, bfloat16 or
            float64 for the kernels.
        target: class indices in [0, C), of the input's shape without C, int64 (or uint8 for (N,));
            or probabilities of the input's shape.
        weight: (C,), a factor for each class; of the input's dtype where targets are indices.
        ignore_index: the class whose losses are 0 and count in no mean.
        reduction: "none", "mean" or "sum"; a mean divides by the sum of the weights of the target
            classes, with probabilities by the number of losses.
        label_smoothing: the part of each target, at most 1, that is spread over all classes.

    Returns:
        A scalar, or with "none" the input's shape without C, in the input's dtype (float32 under
        autocast; what the arguments promote to with probabilities).  The mean of nothing is NaN.
        On a GPU a class out of range makes its loss and its gradient NaN, without waiting for the
        kernel.  Each gradient has the order of dimensions of its argument, where torch writes
        contiguous ones.

    Raises:
        IndexError: a class out of range, on a CPU.
        RuntimeError: shapes or dtypes that do not fit, label_smoothing above 1, an ignore_index of
            0 or more with probabilities, class indices and a weight that requires a gradient.
        ValueError: another number of targets than of inputs, an unknown reduction.

    Source: `torch.nn.functional.cross_entropy`.
    """
    op = "cross_entropy"
    checks.tensor(op, {"weight": weight}, input=input, target=target)
    if type(ignore_index) is not int:
        ignore_index = checks.integer(op, "ignore_index", ignore_index)
    if type(label_smoothing) is not float:
        label_smoothing = checks.number(op, "label_smoothing", label_smoothing)
    loss.check_reduction(op, reduction)
    if label_smoothing > 1:
        checks.fail(RuntimeError, op, "label_smoothing must be at most 1", received=label_smoothing)
    if input.dim() == 0:
        # torch has an error of its own for every kind of target
        return cross_entropy_reference(input, target, weight)
    # as in torch, anything not above 0, NaN included, means no smoothing
    smoothing = float(label_smoothing) if label_smoothing > 0 else 0.0
    probabilities = input.shape == target.shape
    if probabilities:
        _check_probabilities(input, target, ignore_index)
    else:
        classes.check_indices(op, input, target, ", probabilities the input's")
    classes.check_weight(op, input, weight, differentiable=probabilities)
    x, w = binding.autocast_to_float32(input, weight)
    y = target
    if probabilities:
        x, y, w = loss.promote(*binding.autocast_to_float32(input, target, weight))
    if not backend.runs_triton(op, x, declined=_declined(x, y, w)):
        return cross_entropy_reference(
            input, target, weight, ignore_index, reduction, label_smoothing
        )
    if w is not None:
        checks.same_dtype_and_device(op, x, weight=w)
        # copying a rare strided one is cheaper than wide offsets for every class
        w = w.contiguous()
    if input.dim() == 1:
        x, y = x[None], y[None] if probabilities else y.view(1)
    result: Tensor = binding.apply(
        cross_entropy_function.CrossEntropy, x, y, w, ignore_index, reduction, smoothing
    )
    return result[0] if input.dim() == 1 and reduction == "none" else result


def _check_probabilities(input: Tensor, target: Tensor, ignore_index: int) -> None:
    if not target.is_floating_point():
        checks.fail(
            RuntimeError,
            "cross_entropy",
            "a target of the input's shape must be probabilities, of a floating-point dtype",
            input=input,
            target=target,
        )
    if ignore_index >= 0:
        checks.fail(
            RuntimeError,
            "cross_entropy",
            "ignore_index is for class indices, not for probabilities",
            received=ignore_index,
        )


def _declined(input: Tensor, target: Tensor, weight: Tensor | None) -> str | None:
    if classes.count_of(input) == 0:
        return "no classes"
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        return "a weight that requires a gradient"
    return loss.declined(input, target, weight)


def _samples(make: Maker) -> Iterator[Sample]:
    def sample(
        name: str,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        **marks: Any,
    ) -> Sample:
        return Sample(
            name,
            input=input,
            target=target,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            **marks,
        )

    def weights(classes: int) -> Tensor:
        return make(classes, low=0.5, high=2.0)

    def probabilities(*shape: int) -> Tensor:
        return make(*shape, low=0.0, high=2.0 / shape[1])

    yield sample(
        "signals",
        make(3, 5, 29),
        make.classes(3, 29, count=5),
        weights(5),
        ignore_index=2,
        reduction="none",
        layouts=True,
    )
    yield sample("images", make(2, 5, 4, 7), make.classes(2, 4, 7, count=5), layouts=True)
    yield sample(
        "probabilities",
        make(9, 35),
        probabilities(9, 35),
        weights(35),
        label_smoothing=0.1,
        layouts=True,
    )
    yield sample(
        "rows",
        make(5, 300, scale=3.0),
        make.classes(5, count=300),
        weights(300),
        label_smoothing=0.2,
        layouts=True,
    )
    for reduction in ("none", "mean", "sum"):
        yield sample(
            f"tiny-{reduction}",
            make(3, 4),
            make.classes(3, count=4),
            weights(4),
            ignore_index=1,
            reduction=reduction,
            label_smoothing=0.0 if reduction == "mean" else 0.3,
            gradcheck=True,
        )
        yield sample(
            f"tiny-probabilities-{reduction}",
            make(2, 3),
            probabilities(2, 3),
            reduction=reduction,
            gradcheck=True,
        )
        yield sample(
            f"empty-{reduction}", make(0, 3), make.classes(0, count=3), reduction=reduction
        )
        ignored = make.classes(3, count=1)
        yield sample(
            f"all-ignored-{reduction}", make(3, 5), ignored, ignore_index=0, reduction=reduction
        )
        yield sample(
            f"classes-apart-{reduction}",
            make(1, 21, 9, 16),
            make.classes(1, 9, 16, count=21),
            ignore_index=20,
            reduction=reduction,
            label_smoothing=0.1 if reduction == "none" else 0.0,
        )
    for count in (1, 2, 10, 65, 1031, 1040):
        rows = 129 if count <= 10 else 5
        target = make.classes(rows, count=count)
        yield sample(f"{count}-classes", make(rows, count, scale=2.0), target)
    yield sample("long-rows", make(2, 8209), make.classes(2, count=8209), label_smoothing=0.1)
    yield sample("long-probabilities", make(3, 1031), probabilities(3, 1031), reduction="sum")
    yield sample("far-from-zero", make(5, 33) + 1000.0, make.classes(5, count=33))
    yield sample("smoothing-1", make(4, 3), make.classes(4, count=3), label_smoothing=1.0)
    yield sample("bytes", make(4, 3), make.classes(4, count=3, dtype=torch.uint8), reduction="sum")
    yield sample("unbatched", make(7), make.classes(count=7), weights(7), reduction="none")
    yield sample("unbatched-probabilities", make(3), make(3, low=0.0, high=0.6))
    yield sample("volume", make(2, 3, 2, 3, 2), make.classes(2, 2, 3, 2, count=3))


def _workloads(make: Maker) -> Iterator[Sample]:
    images = make.empty(8, 21, 128, 128)
    shapes = (
        ("imagenet", make.empty(256, 1000)),
        ("vocabulary", make.empty(4096, 50257)),
        ("few-rows", make.empty(64, 50304)),
        ("cifar", make.empty(65536, 10)),
        ("100-classes", make.empty(4096, 100)),
        ("64-classes", make.empty(4096, 64)),
        ("images", images),
        ("images-channels-last", images.to(memory_format=torch.channels_last)),
    )
    for name, input in shapes:
        rows = (input.shape[0], *input.shape[2:])
        yield Sample(name, input=input, target=make.classes(*rows, count=input.shape[1]))
    yield Sample(
        "smoothing",
        input=make.empty(1024, 1000),
        target=make.classes(1024, count=1000),
        weight=make.empty(1000),
        label_smoothing=0.1,
    )
    yield Sample(
        "probabilities",
        input=make.empty(4096, 1000),
        target=make.empty(4096, 1000),
        reduction="none",
    )


def _rejects(make: Maker) -> Iterator[Reject]:
    x, y = make(4, 3), make.classes(4, count=3)
    yield Reject(
        "reduction",
        r"cross_entropy: reduction must be 'none', 'mean' or 'sum' \(received 'max'\)",
        input=x,
        target=y,
        reduction="max",
    )
    yield Reject(
        "smoothing",
        r"cross_entropy: label_smoothing must be at most 1 \(received 1.5\)",
        input=x,
        target=y,
        label_smoothing=1.5,
    )
    yield Reject(
        "batch", r"class indices must have shape \(4,\).*\(3,\) int64", input=x, target=y[:3]
    )
    yield Reject("no-batch", r"class indices must have shape \(4,\)", input=x, target=y[0])
    yield Reject("dims", r"class indices must have shape \(4,\)", input=x, target=y[:, None])
    yield Reject(
        "unbatched", r"class indices must have shape \(1,\).*\(2,\)", input=x[0], target=y[:2]
    )
    yield Reject(
        "spatial",
        r"class indices must have shape \(2, 4, 5\).*\(2, 4, 4\)",
        input=make(2, 3, 4, 5),
        target=make.classes(2, 4, 4, count=3),
    )
    yield Reject(
        "int32",
        r"class indices must be int64 or uint8 \(target \(4,\) int32",
        input=x,
        target=y.int(),
    )
    yield Reject(
        "bytes",
        r"class indices of images must be int64 \(target \(2, 4, 5\) uint8",
        input=make(2, 3, 4, 5),
        target=make.classes(2, 4, 5, count=3, dtype=torch.uint8),
    )
    yield Reject(
        "same-shape",
        r"must be probabilities, of a floating-point dtype",
        input=x,
        target=make.classes(4, 3, count=3),
    )
    yield Reject(
        "ignored-probabilities",
        r"ignore_index is for class indices, not for probabilities \(received 1\)",
        input=x,
        target=make(4, 3, low=0.0, high=1.0),
        ignore_index=1,
    )
    for name, target in (("weight", y), ("weight-probabilities", make(4, 3, low=0.0, high=1.0))):
        yield Reject(
            name,
            r"weight must have one element for each of 3 classes \(weight \(2,\)",
            input=x,
            target=target,
            weight=make(2),
        )
    yield Reject(
        "weight-gradient",
        r"with class indices no gradient flows to weight",
        input=x,
        target=y,
        weight=make(3).requires_grad_(),
    )


def _cost(
    input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any
) -> dict[str, Cost]:
    size = input.numel() * input.element_size()
    read = size + target.numel() * target.element_size()
    return {
        "forward": Cost(5 * input.numel(), read),
        "backward": Cost(5 * input.numel(), read + size),
    }


register(
    OpSpec(
        name="cross_entropy",
        op=cross_entropy,
        reference=cross_entropy_reference,
        kernels=(
            "cross_entropy.cross_entropy_forward_kernel",
            "cross_entropy.cross_entropy_backward_kernel",
            "loss.loss_total_kernel",
            *cross_entropy_function.KERNELS,
        ),
        gradients=("input", "target"),
        samples=_samples,
        workloads=_workloads,
        rejects=_rejects,
        cost=_cost,
        accuracy="composite",
        source="torch.nn.functional.cross_entropy",
        autocast="float32",
        layers=("CrossEntropyLoss",),
    )
)
