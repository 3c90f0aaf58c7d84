"""Launches and gradients of the elementwise activations."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import binding, launch
from tritorch.ops import second_gradient, strided
from tritorch.ops.reduce import accumulator_dtype

kernels = launch.kernels("activation")

# activations whose derivative follows from the output; the others need the input
_FROM_OUTPUT = frozenset(("relu", "relu6", "leaky_relu", "sigmoid", "tanh"))
# activations whose gradient torch lays out as the saved tensor, and not as grad_output
_LAID_OUT_AS_SAVED = frozenset(("relu", "leaky_relu"))
# activations that only select among values, and compute nothing
_SELECTING = frozenset(("relu", "relu6", "leaky_relu"))
# activations whose second derivative is not zero: the first derivative as a function of the output
# where it follows from that, else the activation
_CURVED: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "sigmoid": lambda y: y * (1 - y),
    "tanh": lambda y: 1 - y * y,
    "hardswish": F.hardswish,
}


def slope_of(given: float | None) -> float:
    """That of leaky_relu, given or not."""
    # a number that is a default is an input of torch.compile's dynamic programs, made within the
    # Function that reads it first and unknown to the next
    return 0.01 if given is None else given


def needs_output(activation: str, slope: float | None = None) -> bool:
    """Whether `ActivationBackward` takes the activation's output, and not its input."""
    # a negative slope gives one output to two inputs
    return activation in _FROM_OUTPUT and (slope is None or slope >= 0)


def keeps_input(activation: str, slope: float) -> bool:
    """Whether autograd keeps the activation's input, as torch does, and not its output."""
    return activation == "relu6" or not needs_output(activation, slope)


def computes(activation: str | None) -> bool:
    """Whether an epilogue takes registers of its own."""
    return activation is not None and activation not in _SELECTING


@binding.library_op(
    "activation_forward(Tensor input, str activation, float slope) -> Tensor",
    fake=lambda input, activation, slope: strided.empty_like(input),
)
def _activation_forward(input: Tensor, activation: str, slope: float) -> Tensor:
    y = strided.empty_like(input)
    _launch_forward(input, y, activation, slope)
    return y


@binding.library_op(
    "activation_forward_(Tensor(a!) input, str activation, float slope) -> ()",
    fake=lambda input, activation, slope: None,
)
def _activation_forward_(input: Tensor, activation: str, slope: float) -> None:
    _launch_forward(input, input, activation, slope)


def _launch_forward(x: Tensor, y: Tensor, activation: str, slope: float) -> None:
    kernel = kernels.activation_forward_kernel
    run = _plan(kernel, activation, None, x.shape, x.stride(), y.stride())
    run(x, x, y, floats=(slope,))


@launch.planned_by_kernel
def _plan(
    kernel: Any,
    activation: str,
    order: int | None,
    shape: tuple[int, ...],
    *strides: tuple[int, ...],
) -> launch.Prepared:
    nest = strided.nest_of(activation, shape, *strides)
    along = [stride for one in nest.strides for stride in one]
    constants = {} if order is None else {"ORDER": order}
    return launch.Prepared(
        kernel,
        (math.ceil(nest.numel / kernels.BLOCK),),
        (nest.numel, *nest.sizes[1:], *along),
        ACTIVATION=activation,
        INDEX_64=nest.wide,
        BLOCK=kernels.BLOCK,
        **constants,
    )


def _grad_input(
    grad_output: Tensor, saved: Tensor, activation: str, slope: float, order: int
) -> Tensor:
    # a stride of 0 says nothing of the order of dimensions
    as_saved = activation in _LAID_OUT_AS_SAVED or 0 in grad_output.stride()
    return strided.empty_like(saved if as_saved else grad_output)


@binding.library_op(
    "activation_backward(Tensor grad_output, Tensor saved, str activation, float slope, int order)"
    " -> Tensor",
    fake=_grad_input,
)
def _activation_backward(
    grad_output: Tensor, saved: Tensor, activation: str, slope: float, order: int
) -> Tensor:
    grad_input = _grad_input(grad_output, saved, activation, slope, order)
    tensors = grad_output, saved, grad_input
    strides = [tensor.stride() for tensor in tensors]
    run = _plan(kernels.activation_backward_kernel, activation, order, grad_output.shape, *strides)
    run(saved, *tensors, floats=(slope,))
    return grad_input


def keeps_preactivation(ctx: Any, activation: str | None) -> bool:
    """Whether the gradient of a product with this epilogue needs the value before it."""
    return activation is not None and not needs_output(activation) and any(ctx.needs_input_grad)


def save_product(
    ctx: Any,
    operands: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    activation: str | None,
    output: Tensor,
    preactivation: Tensor | None,
) -> None:
    """Saves of activation(input * weight + bias + residual), in this order the first inputs of a
    function, what `grad_preactivation` and the gradients of input and weight take.
    """
    input, weight, bias, residual = operands
    kept = preactivation is not None
    ctx.activation, ctx.keeps_preactivation = activation, kept
    # the value before, which is no result, is known to autograd by what it is computed from
    binding.save_for_backward(
        ctx,
        input if kept or ctx.needs_input_grad[1] else None,
        weight if kept or ctx.needs_input_grad[0] else None,
        bias if kept else None,
        residual if kept else None,
        output if activation is not None and not kept else preactivation,
    )


def grad_preactivation(
    ctx: Any, grad_output: Tensor, saved: Tensor, again: Callable[[], Tensor]
) -> Tensor:
    """The gradient before the activation, from the last tensor of `save_product`.

    `again` computes the value there anew, where a second gradient goes through it.
    """
    if ctx.activation is None:
        return grad_output
    if ctx.keeps_preactivation and torch.is_grad_enabled():
        saved = again()
    grad: Tensor = binding.apply(ActivationBackward, grad_output, saved, ctx.activation)
    return grad


class ActivationBackward(torch.autograd.Function):
    """grad_output times a derivative of the activation, of first or second order.

    `saved` is the output or the input, as `needs_output` says, and the derivative of second order
    is that of the first one by `saved`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        saved: Tensor,
        activation: str,
        slope: float | None = None,
        order: int = 1,
    ) -> Tensor:
        slope = slope_of(slope)
        ctx.activation, ctx.slope, ctx.order = activation, slope, order
        ctx.save_for_backward(saved, grad_output if activation in _CURVED else None)
        grad_input: Tensor = _activation_backward(grad_output, saved, activation, slope, order)
        return grad_input

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, grad_output = ctx.saved_tensors
        rest = ctx.activation, ctx.slope
        into_grad = into_saved = None
        if ctx.needs_input_grad[0]:
            into_grad = binding.apply(ActivationBackward, grad, saved, *rest, ctx.order)
        if ctx.needs_input_grad[1]:
            if ctx.activation not in _CURVED:
                # zeros, as torch's: without allow_unused autograd takes None for an error
                into_saved = torch.zeros_like(saved)
            elif ctx.order == 1:
                into_saved = binding.apply(ActivationBackward, grad * grad_output, saved, *rest, 2)
            else:
                plain = functools.partial(_plain_second, activation=ctx.activation)
                tensors = grad_output, saved
                _, into_saved = second_gradient.through(plain, tensors, (False, True), (grad,))
        return into_grad, into_saved, None, None, None


def _plain_second(grad_output: Tensor, saved: Tensor, *, activation: str) -> tuple[Tensor]:
    """grad_output times the derivative of second order, in plain PyTorch."""
    dtype = accumulator_dtype(saved.dtype)
    x = second_gradient.leaf(saved.to(dtype))
    value = _CURVED[activation](x)
    if activation not in _FROM_OUTPUT:
        (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    return ((grad_output.to(dtype) * second).to(grad_output.dtype),)


class Activation(torch.autograd.Function):
    """Keeps what torch keeps: output or input."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        original: tuple[Tensor] | None,
        activation: str,
        slope: float,
        inplace: bool,
    ) -> Tensor:
        """`original`: what was in the input that is written, where that is kept; in a tuple, so
        that it is saved with its graph and the first gradient has no way there.
        """
        ctx.activation, ctx.slope = activation, slope
        if inplace:
            _activation_forward_(input, activation, slope)
            ctx.mark_dirty(input)
            binding.save_for_backward(ctx, input if original is None else original[0])
            return input
        output: Tensor = _activation_forward(input, activation, slope)
        if not ctx.needs_input_grad[0]:
            return output
        # of leaky_relu torch keeps the input where it is not written
        keeps = keeps_input(activation, slope) or activation == "leaky_relu"
        binding.save_for_backward(ctx, input if keeps else output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        grad_input = binding.apply(
            ActivationBackward, grad_output, saved, ctx.activation, ctx.slope
        )
        return grad_input, None, None, None, None
