"""Softmax and its logarithm: references, launches and gradients, public functions, declarations."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import backend, binding, checks, launch
from tritorch.ops import strided
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register
from tritorch.repeats.decorator import repeated

kernels = launch.kernels("softmax")


def _empty(input: Tensor, dtype: torch.dtype) -> Tensor:
    # contiguous whatever the input's layout, as torch makes it
    return torch.empty_like(input, dtype=dtype, memory_format=torch.contiguous_format)


@binding.library_op(
    "softmax_forward(Tensor input, int dim, ScalarType dtype, bool log) -> Tensor",
    fake=lambda input, dim, dtype, log: _empty(input, dtype),
)
def _softmax_forward(input: Tensor, dim: int, dtype: torch.dtype, log: bool) -> Tensor:
    y = _empty(input, dtype)
    _launch(kernels.softmax_forward_kernel, dim, log, input, y)
    return y


@binding.library_op(
    "softmax_backward(Tensor grad_output, Tensor output, int dim, ScalarType dtype, bool log)"
    " -> Tensor",
    fake=lambda grad_output, output, dim, dtype, log: _empty(output, dtype),
)
def _softmax_backward(
    grad_output: Tensor, output: Tensor, dim: int, dtype: torch.dtype, log: bool
) -> Tensor:
    grad_input = _empty(output, dtype)
    _launch(kernels.softmax_backward_kernel, dim, log, grad_output, output, grad_input)
    return grad_input


def _launch(kernel: Any, dim: int, log: bool, *tensors: Tensor) -> None:
    if tensors[0].numel():
        strides = [tensor.stride() for tensor in tensors]
        _plan(kernel, dim, log, tensors[0].shape, *strides)(tensors[-1], *tensors)


@launch.planned_by_kernel
def _plan(
    kernel: Any, dim: int, log: bool, shape: tuple[int, ...], *of_tensors: tuple[int, ...]
) -> launch.Prepared:
    # a scalar has one value
    n = shape[dim] if shape else 1
    rest = [i for i in range(len(shape)) if i != dim]
    nest = strided.nest_of(
        "softmax",
        tuple(shape[i] for i in rest),
        *(tuple(strides[i] for i in rest) for strides in of_tensors),
    )
    along = [strides[dim] if shape else 1 for strides in of_tensors]
    # the written tensor, which comes last, is contiguous
    config = launch.config(kernels.softmax_config, n, along[-1] == 1)
    block_m, block_n = config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"]
    # masked lanes too have an offset
    end = math.ceil(n / block_n) * block_n
    wide = nest.wide or any(
        strided.is_wide((end, *nest.sizes), (step, *strides))
        for step, strides in zip(along, nest.strides, strict=True)
    )
    steps = zip(along, nest.strides, strict=True)
    return launch.Prepared(
        kernel,
        (math.ceil(nest.numel / block_m),),
        (nest.numel, n, *nest.sizes[1:], *(i for step, along in steps for i in (step, *along))),
        config,
        LOG=log,
        ONE_BLOCK=n <= block_n,
        INDEX_64=wide,
    )


class SoftmaxBackward(torch.autograd.Function):
    """The gradient from the output; its own gradients are torch's arithmetic, of any order."""

    @staticmethod
    def forward(
        ctx: Any, grad_output: Tensor, output: Tensor, dim: int, dtype: torch.dtype, log: bool
    ) -> Tensor:
        ctx.dim, ctx.dtype, ctx.log = dim, dtype, log
        ctx.save_for_backward(grad_output, output)
        grad_input: Tensor = _softmax_backward(grad_output, output, dim, dtype, log)
        return grad_input

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, output = ctx.saved_tensors
        kept = output.dtype
        exact = torch.float64 if kept == torch.float64 else torch.float32
        v, g, y = grad.to(exact), grad_output.to(exact), output.to(exact)

        def total(x: Tensor) -> Tensor:
            return x.sum(ctx.dim, keepdim=True)

        into_grad = into_output = None
        if ctx.log:
            p = y.exp()
            if ctx.needs_input_grad[0]:
                into_grad = v - total(v * p)
            if ctx.needs_input_grad[1]:
                into_output = -v * p * total(g)
        else:
            if ctx.needs_input_grad[0]:
                into_grad = y * (v - total(v * y))
            if ctx.needs_input_grad[1]:
                into_output = v * (g - total(g * y)) - g * total(v * y)
        return (
            None if into_grad is None else into_grad.to(kept),
            None if into_output is None else into_output.to(kept),
            None,
            None,
            None,
        )


class Softmax(torch.autograd.Function):
    """Keeps only the output."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, dim: int, dtype: torch.dtype, log: bool) -> Tensor:
        ctx.dim, ctx.dtype, ctx.log = dim, input.dtype, log
        output: Tensor = _softmax_forward(input, dim, dtype, log)
        binding.save_for_backward(ctx, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (output,) = ctx.saved_tensors
        grad_input = binding.apply(
            SoftmaxBackward, grad_output, output, ctx.dim, ctx.dtype, ctx.log
        )
        return grad_input, None, None, None


@repeated
def softmax(input: Tensor, dim: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """exp(input) / sum(exp(input)) along a dimension.

    Rows may have any length: the memory that a program needs does not grow with them.  A dimension
    other than the last is read by its strides.

    Args:
        input: any shape and strides; float32, float16, bfloat16 or float64 for the kernels, other
            dtypes take the reference path.
        dim: the dimension that is summed over; None for torch's choice, with torch's warning.
        dtype: the dtype of the result, to which the input is converted first.

    Returns:
        A contiguous tensor of the input's shape.  CUDA autocast makes it float32 where no dtype is
        given, as torch's.

    Raises:
        IndexError: `dim` is not a dimension of the input.
        TypeError: `input` is not a tensor, `dim` not an integer, `dtype` not a torch dtype.

    Source: `torch.nn.functional.softmax`.
    """
    return _call("softmax", F.softmax, False, input, dim, dtype)


@repeated
def log_softmax(input: Tensor, dim: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """input - log(sum(exp(input))) along a dimension, without overflow; otherwise as `softmax`.

    Source: `torch.nn.functional.log_softmax`.
    """
    return _call("log_softmax", F.log_softmax, True, input, dim, dtype)


def _call(
    op: str,
    reference: Callable[..., Tensor],
    log: bool,
    input: Tensor,
    dim: int | None,
    dtype: torch.dtype | None,
) -> Tensor:
    checks.tensor(op, input=input)
    if not (dtype is None or isinstance(dtype, (torch.dtype, type))):
        checks.fail(TypeError, op, "dtype must be a torch.dtype", received=dtype)
    if dim is None:
        checks.warn(
            f"Implicit dimension choice for {op} has been deprecated. "
            "Change the call to include dim=X as an argument."
        )
        dim = 0 if input.dim() in (0, 1, 3) else 1
    elif type(dim) is not int:
        dim = checks.integer(op, "dim", dim)
    rank = max(input.dim(), 1)
    if not -rank <= dim < rank:
        rule = f"dim must be from {-rank} to {rank - 1}"
        checks.fail(IndexError, op, rule, input=input, dim=dim)
    if not backend.runs_triton(op, input, declined=_declined(input, dtype)):
        return reference(input, dim, dtype=dtype)
    if dtype is None:
        # torch's autocast of the CPU leaves it alone
        cast = input.is_cuda and torch.is_autocast_enabled("cuda")
        cast = cast and input.dtype != torch.float64
        dtype = torch.float32 if cast else input.dtype
    output: Tensor = binding.apply(Softmax, input, dim % rank, dtype, log)
    return output


def _declined(input: Tensor, dtype: torch.dtype | None) -> str | None:
    if input.dim() > strided.RANK + 1:
        return f"{input.dim()} dimensions"
    # torch takes Python's float too
    if dtype is not None and not getattr(dtype, "is_floating_point", False):
        return f"dtype {dtype}"
    return None


def _samples(make: Maker) -> Iterator[Sample]:
    yield from _log_samples(make)
    # layouts and sizes, for which log_softmax runs the same code
    yield Sample("scalar", input=make(), dim=-1, dtype=None)
    yield Sample("no-rows", input=make(0, 3), dim=-1, dtype=None)
    yield Sample("no-values", input=make(3, 0), dim=1, dtype=None)
    yield Sample("long-columns", input=make(35, 65, scale=2.0), dim=0, dtype=None)
    yield Sample("block-and-one-columns", input=make(17, 2, scale=2.0), dim=0, dtype=None)
    yield Sample("float64", input=make(5, 7), dim=1, dtype=torch.float64)


def _log_samples(make: Maker) -> Iterator[Sample]:
    yield Sample("images", input=make(2, 3, 4, 5), dim=1, dtype=None, layouts=True)
    yield Sample("tiny", input=make(3, 4), dim=1, dtype=None, gradcheck=True)
    # values of more than one block
    yield Sample("block-and-one-rows", input=make(2, 1025, scale=2.0), dim=-1, dtype=None)
    # less than what exp can take, in more rows than one block
    yield Sample("far", input=make(10, 7, low=-1000.0, high=-996.0), dim=1, dtype=None)


def _workloads(make: Maker) -> Iterator[Sample]:
    yield Sample("logits", input=make.empty(4096, 1000), dim=1, dtype=None)
    yield Sample("digits", input=make.empty(65536, 16), dim=1, dtype=None)
    yield Sample("pixels", input=make.empty(32, 64, 56, 56), dim=1, dtype=None)
    yield Sample("long", input=make.empty(256, 32768), dim=1, dtype=None)


def _rejects(op: str, make: Maker) -> Iterator[Reject]:
    values: Any = [1.0]
    yield Reject(
        "not-a-tensor",
        rf"{op}: input must be a Tensor, not list",
        input=values,
        dim=0,
        raises=TypeError,
    )
    yield Reject(
        "dim", rf"{op}: dim must be from -2 to 1.*\(2, 3\).*dim 2", input=make(2, 3), dim=2
    )


def _cost(input: Tensor, dim: int | None = None, dtype: Any = None) -> dict[str, Cost]:
    size = input.numel() * input.element_size()
    return {
        "forward": Cost(4 * input.numel(), 2 * size),
        "backward": Cost(4 * input.numel(), 3 * size),
    }


def _register(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    layer: str,
    samples: Callable[[Maker], Iterator[Sample]],
) -> None:
    register(
        OpSpec(
            name=op.__name__,
            op=op,
            reference=reference,
            kernels=("softmax.softmax_forward_kernel", "softmax.softmax_backward_kernel"),
            gradients=("input",),
            samples=samples,
            workloads=_workloads,
            rejects=functools.partial(_rejects, op.__name__),
            cost=_cost,
            accuracy="composite",
            source=f"torch.nn.functional.{op.__name__}",
            layers=(layer,),
        )
    )


_register(softmax, F.softmax, "Softmax", _samples)
_register(log_softmax, F.log_softmax, "LogSoftmax", _log_samples)
