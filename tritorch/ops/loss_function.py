"""Elementwise losses as functions of autograd, twice differentiable."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from tritorch import binding
from tritorch.ops import loss


class ElementwiseLoss(torch.autograd.Function):
    """Input and target have one shape and dtype; weights broadcast and have no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        pos_weight: Tensor | None,
        op: str,
        reduction: str,
        threshold: float,
    ) -> Tensor:
        result: Tensor
        result, denominator = loss.elementwise_loss_forward(
            input, target, weight, pos_weight, op, reduction, threshold
        )
        divides = denominator.numel() == 1
        binding.save_for_backward(
            ctx, input, target, weight, pos_weight, denominator if divides else None
        )
        divisor = input.numel() if reduction == "mean" and not divides else 1
        ctx.constants = (op, divisor, threshold)
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, *saved = ctx.saved_tensors
        grads = [
            binding.apply(
                ElementwiseLossBackward,
                grad_output.expand(input.shape),
                input,
                *saved,
                wanted,
                *ctx.constants,
            )
            if needed
            else None
            for needed, wanted in zip(ctx.needs_input_grad, ("input", "target"), strict=False)
        ]
        return (*grads, None, None, None, None, None)


class ElementwiseLossBackward(torch.autograd.Function):
    """Linear in the gradient of the loss, so that it is that part of its own gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        pos_weight: Tensor | None,
        denominator: Tensor | None,
        wanted: loss.Wanted,
        op: str,
        divisor: int,
        threshold: float,
    ) -> Tensor:
        ctx.save_for_backward(grad_output, input, target, weight, pos_weight, denominator)
        ctx.constants = (wanted, op, divisor, threshold)
        grad: Tensor = loss.elementwise_loss_backward(
            grad_output,
            input,
            target,
            weight,
            pos_weight,
            None,
            denominator,
            op,
            wanted,
            divisor,
            threshold,
        )
        return grad

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, *saved = ctx.saved_tensors
        wanted, op, *_ = ctx.constants
        needs_grad_output, *needed = ctx.needs_input_grad[:3]
        of_grad_output = None
        if needs_grad_output:
            of_grad_output = binding.apply(ElementwiseLossBackward, grad, *saved, *ctx.constants)
        of_operands: list[Tensor | None] = [None, None]
        for place, name in enumerate(("input", "target")):
            if not needed[place]:
                continue
            if _is_linear(op, wanted, name):
                of_operands[place] = torch.zeros_like(saved[place])
            else:
                of_operands[place] = binding.apply(
                    ElementwiseLossSecondBackward, grad, grad_output, *saved, name, *ctx.constants
                )
        return (of_grad_output, *of_operands, *[None] * 7)


class ElementwiseLossSecondBackward(torch.autograd.Function):
    """A gradient that refuses to be differentiated, where one without a graph would be left out."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        grad_output: Tensor,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        pos_weight: Tensor | None,
        denominator: Tensor | None,
        name: str,
        wanted: loss.Wanted,
        op: str,
        divisor: int,
        threshold: float,
    ) -> Tensor:
        ctx.op = op
        result: Tensor = loss.elementwise_loss_backward(
            grad_output,
            input,
            target,
            weight,
            pos_weight,
            grad,
            denominator,
            op,
            f"{wanted}/{name}",
            divisor,
            threshold,
        )
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> NoReturn:
        loss.refuse_third_derivative(ctx.op)


def _is_linear(op: str, wanted: str, name: str) -> bool:
    """Whether the second derivative is 0 everywhere."""
    if op == "l1_loss":
        return True
    return op.startswith("binary_cross_entropy") and wanted == name == "target"
