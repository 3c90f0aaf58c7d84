"""Cross-entropy as a function of autograd, and the launches of the gradients of its gradients."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import binding, launch
from tritorch.ops import cross_entropy_rows, second_gradient, strided
from tritorch.ops.reduce import accumulator_dtype
from tritorch.ops.strided import Layout

kernels = launch.kernels("cross_entropy_second")

KERNELS = (
    "cross_entropy_second.cross_entropy_second_rows_kernel",
    "cross_entropy_second.cross_entropy_second_kernel",
)


def _outputs(
    grad: Tensor,
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
    needs_input: bool,
    needs_target: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of grad_output, input and target; empty where not needed."""
    return (
        input.new_empty(grad_output.shape),
        strided.empty_like(input) if needs_input else input.new_empty((0,)),
        strided.empty_like(target) if needs_target else target.new_empty((0,)),
    )


@binding.library_op(
    "cross_entropy_second(Tensor grad, Tensor grad_output, Tensor input, Tensor target, "
    "Tensor? weight, Tensor rows, Tensor? denominator, int ignore_index, SymInt divisor, "
    "float label_smoothing, str wanted, bool needs_input, bool needs_target)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_outputs,
)
def _second(
    grad: Tensor,
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
    needs_input: bool,
    needs_target: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`grad` is the gradient of a gradient; `wanted` says which: that of "input" or of "target"."""
    results = _outputs(
        grad,
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
        needs_input,
        needs_target,
    )
    if not cross_entropy_rows.are_kept(rows):
        rows = cross_entropy_rows.computed_again(
            rows, input, target, weight, ignore_index, label_smoothing
        )
    products = rows.new_empty(grad_output.shape)
    of_classes = cross_entropy_rows.weight_stride(weight), ignore_index
    spread = cross_entropy_rows.spreads(target, label_smoothing)
    given = Layout.of(input), divisor, of_classes, spread, wanted
    walked = target.stride(), grad.stride()
    tensors = input, target, weight, rows, grad
    run = _plan(None, *given, walked, ())
    run(input, *tensors, denominator, products, results[0], floats=(label_smoothing,))
    for name, needed, result in (
        ("input", needs_input, results[1]),
        ("target", needs_target, results[2]),
    ):
        if needed:
            run = _plan(name, *given, (*walked, result.stride()), (grad_output.stride(),))
            others = products, grad_output, denominator, result
            run(input, *tensors, *others, floats=(label_smoothing,))
    return results


@launch.planned
def _plan(
    with_respect_to: str | None,
    input: Layout,
    divisor: int,
    of_classes: tuple[int, int],
    spread: bool,
    wanted: str,
    classified: tuple[tuple[int, ...], ...],
    others: tuple[tuple[int, ...], ...],
) -> launch.Prepared:
    """The products of rows, which come first, or a gradient."""
    rows, classes = input.shape[0] * math.prod(input.shape[2:]), input.shape[1]
    config = launch.config(kernels.cross_entropy_second_config, rows, classes, input.stride(1) == 1)
    nest, strides, layout = cross_entropy_rows.walk(config, input, classified, others)
    tiles_n = math.ceil(rows / config.kwargs["BLOCK_N"])
    constants: dict[str, bool] = {}
    tiles_c: tuple[int, ...] = ()
    if with_respect_to is None:
        kernel = kernels.cross_entropy_second_rows_kernel
    else:
        kernel = kernels.cross_entropy_second_kernel
        constants["WITH_RESPECT_TO_INPUT"] = with_respect_to == "input"
        tiles_c = (math.ceil(classes / config.kwargs["BLOCK_C"]),)
    return launch.Prepared(
        kernel,
        (tiles_n * math.prod(tiles_c),),
        (rows, classes, *tiles_c, divisor, *nest.sizes[1:], *strides, *of_classes),
        config,
        SPREAD=spread,
        PROBABILITIES=len(classified[0]) == len(input.shape),
        OF_INPUT=wanted == "input",
        INDEX_64=layout["INDEX_64"],
        **constants,
    )


class CrossEntropySecondBackward(torch.autograd.Function):
    """Gradients of one gradient; their own are plain PyTorch's."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
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
        needs_input: bool,
        needs_target: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(grad, grad_output, input, target, weight, denominator)
        ctx.options = ignore_index, label_smoothing
        ctx.divisor, ctx.wanted, ctx.needs = divisor, wanted, (True, needs_input, needs_target)
        constants = ignore_index, divisor, label_smoothing, wanted, needs_input, needs_target
        results: tuple[Tensor, Tensor, Tensor] = _second(
            grad, grad_output, input, target, weight, rows, denominator, *constants
        )
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, weight, denominator = ctx.saved_tensors
        plain = functools.partial(
            _plain_second,
            weight=weight,
            options=ctx.options,
            divisor=ctx.divisor if denominator is None else denominator,
            wanted=ctx.wanted,
            needs=ctx.needs,
        )
        found = second_gradient.through(plain, tensors, ctx.needs_input_grad[:4], grads)
        return *found, *(None,) * 9


def _plain_second(
    grad: Tensor,
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None,
    options: tuple[int, float],
    divisor: int | Tensor,
    wanted: str,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """What `_second` computes, in plain PyTorch."""
    dtype = accumulator_dtype(input.dtype)
    of_output, x = (second_gradient.leaf(one.to(dtype)) for one in (grad_output, input))
    y = target
    if target.is_floating_point():
        y = second_gradient.leaf(target.to(dtype))
    ignore_index, label_smoothing = options
    losses = F.cross_entropy(
        x,
        y,
        None if weight is None else weight.to(dtype),
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    by = x if wanted == "input" else y
    (first,) = torch.autograd.grad(losses, by, of_output / divisor, create_graph=True)
    given = zip((of_output, x, y), (grad_output, input, target), needs, strict=True)
    ends = [(end, one.dtype) if needed else None for end, one, needed in given]
    found = iter(
        torch.autograd.grad(
            first,
            [end[0] for end in ends if end is not None],
            grad.to(dtype),
            create_graph=True,
        )
    )
    return tuple(None if end is None else next(found).to(end[1]) for end in ends)


class CrossEntropyBackward(torch.autograd.Function):
    """One gradient, of the input or of probabilities."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        rows: Tensor,
        denominator: Tensor | None,
        *constants: Any,
    ) -> Tensor:
        saved = (grad_output, input, target, weight, rows, denominator)
        ctx.save_for_backward(*saved)
        ctx.constants = constants
        grad: Tensor = cross_entropy_rows.backward(*saved, *constants)
        return grad

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        # read once: activation checkpoints allow no second read
        tensors = ctx.saved_tensors
        target = tensors[2]
        # the gradient of probabilities has none of them in it
        linear = ctx.constants[-1] == "target"
        found = binding.apply(
            CrossEntropySecondBackward,
            grad,
            *tensors,
            *ctx.constants,
            needed[1],
            needed[2] and not linear,
        )
        if needed[2] and linear:
            found = (*found[:2], torch.zeros_like(target))
        grads = [one if wanted else None for one, wanted in zip(found, needed, strict=True)]
        return (*grads, *[None] * (len(ctx.needs_input_grad) - 3))


class CrossEntropy(torch.autograd.Function):
    """Keeps the softmax statistics of long rows; the gradients compute softmax again from them."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
    ) -> Tensor:
        keep_rows = any(ctx.needs_input_grad)
        result: Tensor
        result, rows, denominator = cross_entropy_rows.forward(
            input, target, weight, ignore_index, reduction, label_smoothing, keep_rows
        )
        if not keep_rows:
            return result
        divides = denominator.numel() == 1
        binding.save_for_backward(
            ctx, input, target, weight, rows, denominator if divides else None
        )
        ctx.ignore_index, ctx.label_smoothing = ignore_index, label_smoothing
        mean_of_rows = reduction == "mean" and not divides
        ctx.divisor = cross_entropy_rows.first_class(input).numel() if mean_of_rows else 1
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # read once: activation checkpoints allow no second read
        tensors = ctx.saved_tensors
        input = tensors[0]
        grads = [
            binding.apply(
                CrossEntropyBackward,
                grad_output.expand(cross_entropy_rows.first_class(input).shape),
                *tensors,
                ctx.ignore_index,
                ctx.divisor,
                ctx.label_smoothing,
                wanted,
            )
            if needed
            else None
            for needed, wanted in zip(ctx.needs_input_grad, ("input", "target"), strict=False)
        ]
        return (*grads, None, None, None, None)
