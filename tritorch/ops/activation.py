"""ReLU: reference, launches and gradient, public function, declaration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tritorch import backend, binding, checks, launch
from tritorch.ops import strided
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register

kernels = launch.kernels("activation")


def relu_reference(input: Tensor, inplace: bool = False) -> Tensor:
    """max(input, 0), NaN passed on."""
    return torch.relu_(input) if inplace else torch.relu(input)


@binding.library_op("relu_forward(Tensor input) -> Tensor", fake=strided.empty_like)
def _relu_forward(input: Tensor) -> Tensor:
    y = strided.empty_like(input)
    _launch_forward(input, y)
    return y


@binding.library_op("relu_forward_(Tensor(a!) input) -> ()", fake=lambda input: None)
def _relu_forward_(input: Tensor) -> None:
    _launch_forward(input, input)


def _launch_forward(x: Tensor, y: Tensor) -> None:
    nest = strided.nest("relu", x, y)
    launch.run(
        kernels.relu_forward_kernel,
        (math.ceil(nest.numel / kernels.BLOCK),),
        x,
        y,
        nest.numel,
        *nest.sizes[1:],
        *nest.strides[0],
        *nest.strides[1],
        on=x,
        INDEX_64=nest.wide,
        BLOCK=kernels.BLOCK,
    )


@binding.library_op(
    "relu_backward(Tensor grad_output, Tensor output) -> Tensor",
    fake=lambda grad_output, output: strided.empty_like(output),
)
def _relu_backward(grad_output: Tensor, output: Tensor) -> Tensor:
    grad_input = strided.empty_like(output)
    nest = strided.nest("relu", grad_output, output, grad_input)
    launch.run(
        kernels.relu_backward_kernel,
        (math.ceil(nest.numel / kernels.BLOCK),),
        grad_output,
        output,
        grad_input,
        nest.numel,
        *nest.sizes[1:],
        *nest.strides[0],
        *nest.strides[1],
        *nest.strides[2],
        on=output,
        INDEX_64=nest.wide,
        BLOCK=kernels.BLOCK,
    )
    return grad_input


class ReluBackward(torch.autograd.Function):
    """grad_output where output > 0: linear in grad_output, so its own gradient is itself."""

    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, output: Tensor) -> Tensor:
        ctx.save_for_backward(output)
        grad_input: Tensor = _relu_backward(grad_output, output)
        return grad_input

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (output,) = ctx.saved_tensors
        return binding.apply(ReluBackward, grad, output), None


class Relu(torch.autograd.Function):
    """Keeps the output alone: it tells where the input was positive."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, inplace: bool) -> Tensor:
        if inplace:
            _relu_forward_(input)
            ctx.mark_dirty(input)
            output = input
        else:
            output = _relu_forward(input)
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (output,) = ctx.saved_tensors
        return binding.apply(ReluBackward, grad_output, output), None


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """max(input, 0) elementwise; NaN and -0.0 pass, as in torch.

    Args:
        input: any shape and strides; float32, float16, bfloat16 or float64 for the kernels, other
        dtypes take
            the reference path.
        inplace: write the result into `input` and return it.

    Returns:
        A tensor of the input's shape, dtype and order of dimensions.

    Raises:
        RuntimeError: a boolean input, or (in place) a leaf that requires a gradient.
        TypeError: `input` is not a tensor.

    Source: `torch.nn.functional.relu`.
    """
    checks.tensor("relu", input=input)
    if input.dtype == torch.bool:
        checks.fail(RuntimeError, "relu", "boolean inputs are not supported", input=input)
    if inplace:
        checks.writable("relu", input)
    if not backend.runs_triton("relu", input, declined=_declined(input)):
        return relu_reference(input, inplace)
    output: Tensor = binding.apply(Relu, input, inplace)
    return output


def _declined(input: Tensor) -> str | None:
    return f"{input.dim()} dimensions" if input.dim() > strided.RANK else None


def _samples(make: Maker) -> Iterator[Sample]:
    yield Sample("one", input=make(1), inplace=False)
    yield Sample("empty", input=make(0, 3), inplace=False)
    yield Sample("scalar", input=make(), inplace=False)
    yield Sample("block-1", input=make(1023), inplace=False)
    yield Sample("block", input=make(1024), inplace=False)
    yield Sample("blocks", input=make(2048), inplace=False)
    yield Sample("images", input=make(2, 3, 5, 7), inplace=False, layouts=True)
    yield Sample("tiny", input=make(3, 2), inplace=False, gradcheck=True)
    yield Sample("volume", input=make(2, 3, 4, 5, 6), inplace=False)


def _workloads(make: Maker) -> Iterator[Sample]:
    yield Sample("resnet50-stem", input=make.empty(32, 64, 112, 112), inplace=False)
    yield Sample("odd", input=make.empty(1023, 1021), inplace=False)
    yield Sample("sliced", input=make.empty(64, 128, 56, 112)[..., ::2], inplace=False)


def _rejects(make: Maker) -> Iterator[Reject]:
    bools = torch.zeros(3, dtype=torch.bool, device=make.device)
    yield Reject("bool", r"relu: boolean inputs.*\(3,\) bool", input=bools)
    yield Reject("not-a-tensor", r"relu: input must be a Tensor, not list", input=[1.0])  # type: ignore[list-item]


def _cost(input: Tensor, inplace: bool = False) -> dict[str, Cost]:
    size = input.numel() * input.element_size()
    return {
        "forward": Cost(input.numel(), 2 * size),
        "backward": Cost(input.numel(), 3 * size),
    }


register(
    OpSpec(
        name="relu",
        op=relu,
        reference=relu_reference,
        kernels=("activation.relu_forward_kernel", "activation.relu_backward_kernel"),
        gradients=("input",),
        samples=_samples,
        workloads=_workloads,
        rejects=_rejects,
        cost=_cost,
        accuracy="exact",
        source="torch.nn.functional.relu",
        layers=("ReLU",),
    )
)
