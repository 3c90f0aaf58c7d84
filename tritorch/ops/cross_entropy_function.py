"""Cross-entropy as a function of autograd, and the launches of the gradients of its gradients."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from tritorch import binding, launch
from tritorch.ops import cross_entropy_rows, loss, strided

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
    """Gradients of grad_output, input and target; no element where none is needed."""
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
    """`wanted` names the variable of the gradient that `grad` is the gradient of."""
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
    count, classes = grad_output.numel(), input.shape[1]
    config = launch.config(
        kernels.cross_entropy_second_config, count, classes, input.stride(1) == 1
    )
    tiles_n = math.ceil(count / config.kwargs["BLOCK_N"])
    tiles_c = math.ceil(classes / config.kwargs["BLOCK_C"])
    products = rows.new_empty(grad_output.shape)
    constants = {
        "SPREAD": cross_entropy_rows.spreads(target, label_smoothing),
        "PROBABILITIES": target.is_floating_point(),
        "OF_INPUT": wanted == "input",
    }
    scalars = (weight.stride(0) if weight is not None else 1, ignore_index, label_smoothing)
    nest, strides, layout = cross_entropy_rows.walk(config, (input, target, grad), ())
    launch.run(
        kernels.cross_entropy_second_rows_kernel,
        (tiles_n,),
        input,
        target,
        weight,
        rows,
        grad,
        denominator,
        products,
        results[0],
        count,
        classes,
        divisor,
        *nest.sizes[1:],
        *strides,
        *scalars,
        on=input,
        config=config,
        INDEX_64=layout["INDEX_64"],
        **constants,
    )
    for name, needed, result in (
        ("input", needs_input, results[1]),
        ("target", needs_target, results[2]),
    ):
        if not needed:
            continue
        walked = (input, target, grad, result)
        nest, strides, layout = cross_entropy_rows.walk(config, walked, (grad_output,))
        launch.run(
            kernels.cross_entropy_second_kernel,
            (tiles_n * tiles_c,),
            input,
            target,
            weight,
            rows,
            grad,
            products,
            grad_output,
            denominator,
            result,
            count,
            classes,
            tiles_c,
            divisor,
            *nest.sizes[1:],
            *strides,
            *scalars,
            on=input,
            config=config,
            WITH_RESPECT_TO_INPUT=name == "input",
            INDEX_64=layout["INDEX_64"],
            **constants,
        )
    return results


class CrossEntropySecondBackward(torch.autograd.Function):
    """Gradients that refuse to be differentiated, where ones without a graph would be left out."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        results: tuple[Tensor, Tensor, Tensor] = _second(*arguments)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        loss.refuse_third_derivative("cross_entropy")


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
        # asked for once: checkpoints give them once
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
    """Keeps of each row what its softmax needs, and computes it again for the gradients."""

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
        # asked for once: checkpoints give them once
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
