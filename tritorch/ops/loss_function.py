"""Elementwise losses as functions of autograd, whose third derivatives are plain PyTorch's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import binding
from tritorch.ops import loss, second_gradient
from tritorch.ops.reduce import accumulator_dtype


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
    """The derivative of a gradient by input or target; its own gradients are plain PyTorch's."""

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
        ctx.save_for_backward(grad, grad_output, input, target, weight, pos_weight, denominator)
        ctx.constants = (name, wanted, op, divisor, threshold)
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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, weight, pos_weight, denominator = ctx.saved_tensors
        name, wanted, op, divisor, threshold = ctx.constants
        plain = functools.partial(
            _plain_second,
            losses=_losses(op, weight, pos_weight, threshold),
            divisor=divisor if denominator is None else denominator,
            order=(wanted, name),
        )
        found = second_gradient.through(plain, tensors, ctx.needs_input_grad[:4], (grad,))
        return *found, *(None,) * 8


def _losses(
    op: str, weight: Tensor | None, pos_weight: Tensor | None, threshold: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """Of input and target the loss of each element, in plain PyTorch, which knows no dtype of a
    weight but theirs.
    """

    def losses(input: Tensor, target: Tensor) -> Tensor:
        weights = [None if one is None else one.to(input.dtype) for one in (weight, pos_weight)]
        if op == "binary_cross_entropy":
            return F.binary_cross_entropy(input, target, weights[0], reduction="none")
        if op == "binary_cross_entropy_with_logits":
            return F.binary_cross_entropy_with_logits(
                input, target, weights[0], reduction="none", pos_weight=weights[1]
            )
        if op == "huber_loss":
            found = F.huber_loss(input, target, "none", threshold)
        else:
            found = F.smooth_l1_loss(input, target, reduction="none", beta=threshold)
        return found if weights[0] is None else found * weights[0]

    return losses


def _plain_second(
    grad: Tensor,
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    *,
    losses: Callable[[Tensor, Tensor], Tensor],
    divisor: int | Tensor,
    order: tuple[str, str],
) -> tuple[Tensor]:
    """The derivative by the second name of `order` of the gradient by the first."""
    dtype = accumulator_dtype(input.dtype)
    x, y = (second_gradient.leaf(one.to(dtype)) for one in (input, target))
    first, second = ({"input": x, "target": y}[name] for name in order)
    weights = grad_output.to(dtype) / divisor
    (value,) = torch.autograd.grad(losses(x, y), first, weights, create_graph=True)
    (found,) = torch.autograd.grad(value, second, grad.to(dtype), create_graph=True)
    return (found.to(input.dtype),)


def _is_linear(op: str, wanted: str, name: str) -> bool:
    """Whether the second derivative is 0 everywhere."""
    if op == "l1_loss":
        return True
    return op.startswith("binary_cross_entropy") and wanted == name == "target"
