"""Sum over everything but one dimension, and the last step of every split reduction."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tritorch import backend, binding, checks, launch
from tritorch.ops import strided
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register
from tritorch.repeats.decorator import repeated

kernels = launch.kernels("reduce")


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in: float64 for float64, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def split_sum(
    partial: Tensor,
    output: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    preactivation: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """Adds `partial` (splits, elements) over its first dimension into the dense `output`, in order.

    A bias runs along the last dimension of a contiguous output.  A residual has the output's shape
    and any strides.  `preactivation`, laid out as `output`, takes what the activation is applied
    to.
    """
    row = (1, 1) if bias is None else (output.shape[-1], bias.stride(0))
    sizes = output.numel(), partial.shape[0], *row
    along = None
    if residual is not None and residual.stride() != output.stride():
        # in the order of the output, which is dense
        along = output.shape, residual.stride(), output.stride()
    run = _plan_split_sum(sizes, bias is not None, preactivation is not None, activation, along)
    run(output, partial, bias, output, preactivation, residual)


def many_splits_sum(partial: Tensor, output: Tensor, block_s: int) -> None:
    """As `split_sum`, `block_s` splits side by side, into an output of any strides whose elements
    `partial` has in the order of its dimensions.
    """
    shape, strides = tuple(output.shape), output.stride()
    _plan_many_splits_sum(partial.shape[0], shape, strides, block_s)(output, partial, output)


@launch.planned
def _plan_many_splits_sum(
    splits: int, shape: tuple[int, ...], strides: tuple[int, ...], block_s: int
) -> launch.Prepared:
    elements, padding = math.prod(shape), strided.RANK - len(shape)
    sizes, along = shape[1:] + (1,) * padding, strides + (0,) * padding
    block = kernels.MANY_BLOCK // block_s
    # so many fill every GPU without splits
    assert elements + block <= 2**31, elements
    return launch.Prepared(
        kernels.many_splits_sum_kernel,
        (math.ceil(elements / block),),
        (elements, splits, *sizes, *along),
        BLOCK_S=block_s,
        BLOCK=block,
    )


@launch.planned
def _plan_split_sum(
    sizes: tuple[int, ...],
    has_bias: bool,
    keeps_preactivation: bool,
    activation: str | None,
    residual: tuple[tuple[int, ...], ...] | None,
) -> launch.Prepared:
    along = None
    if residual is not None:
        nest = strided.nest_of("split_sum", *residual)
        along = *nest.sizes[1:], *nest.strides[0]
    return launch.Prepared(
        kernels.split_sum_kernel,
        (math.ceil(sizes[0] / kernels.BLOCK),),
        (*sizes, along),
        ACTIVATION=activation,
        HAS_BIAS=has_bias,
        KEEPS_PREACTIVATION=keeps_preactivation,
        BLOCK=kernels.BLOCK,
    )


def channel_sum_reference(input: Tensor, dim: int = 1) -> Tensor:
    """input.sum over every dimension but `dim`."""
    dim = dim % input.dim()
    others = [d for d in range(input.dim()) if d != dim]
    # without dimensions torch would sum over all of them
    return input.sum(others) if others else input.clone()


def _channel_sum_output(input: Tensor, dim: int) -> Tensor:
    return input.new_empty((input.shape[dim],))


@binding.library_op("channel_sum(Tensor input, int dim) -> Tensor", fake=_channel_sum_output)
def _channel_sum(input: Tensor, dim: int) -> Tensor:
    output = _channel_sum_output(input, dim)
    sum_channels(input, dim, output)
    return output


def sum_channels(input: Tensor, dim: int, output: Tensor) -> None:
    """Writes the sums of `input` over every dimension but `dim` into `output`."""
    channels = input.shape[dim]
    count = input.numel() // channels if channels else 0
    if count == 0:
        output.zero_()
        return
    splits, run = _plan_channel_sum(input.shape, input.stride(), dim)
    partial = output
    if splits > 1:
        partial = input.new_empty((splits, channels), dtype=accumulator_dtype(input.dtype))
    run(input, input, partial)
    if splits > 1:
        split_sum(partial, output)


@launch.planned
def _plan_channel_sum(
    shape: tuple[int, ...], strides: tuple[int, ...], dim: int
) -> tuple[int, launch.Prepared]:
    channels, count = shape[dim], math.prod(shape) // shape[dim]
    others = (*shape[:dim], *shape[dim + 1 :]), (*strides[:dim], *strides[dim + 1 :])
    nest = strided.nest_of("channel_sum", *others)
    config = launch.config(kernels.channel_sum_config, strides[dim] == 1)
    block_r, block_c = config.kwargs["BLOCK_R"], config.kwargs["BLOCK_C"]
    steps = math.ceil(count / block_r)
    splits = kernels.num_splits(math.ceil(channels / block_c), steps, 4)
    steps_per_split = math.ceil(steps / splits)
    splits = math.ceil(steps / steps_per_split)
    sizes = channels, count, steps_per_split, *nest.sizes[1:]
    return splits, launch.Prepared(
        kernels.channel_sum_kernel,
        (math.ceil(channels / block_c), splits),
        (*sizes, strides[dim], *nest.strides[0]),
        config,
        INDEX_64=strided.nest_of("channel_sum", shape, strides).wide,
    )


class ChannelSum(torch.autograd.Function):
    """A sum: its gradient is an expanded view, whose gradient is a sum again."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, dim: int) -> Tensor:
        ctx.dim, ctx.shape = dim, input.shape
        output: Tensor = _channel_sum(input, dim)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        view = [1] * len(ctx.shape)
        view[ctx.dim] = ctx.shape[ctx.dim]
        return grad_output.reshape(view).expand(ctx.shape), None


@repeated
def channel_sum(input: Tensor, dim: int = 1) -> Tensor:
    """Sums `input` over every dimension but `dim`: the gradient of a bias.

    Args:
        input: at least one dimension, any strides.
        dim: the dimension that stays.

    Returns:
        A tensor of shape (input.shape[dim],) in the input's dtype; the sum itself is kept in
        float32 (float64 for float64) and added in an order that shape and strides alone decide.

    Raises:
        IndexError: `dim` is not a dimension of `input`.
    """
    checks.tensor("channel_sum", input=input)
    if not -input.dim() <= dim < input.dim():
        checks.fail(
            IndexError, "channel_sum", f"dim {dim} is not a dimension of the input", input=input
        )
    dim = dim % input.dim()
    declined = f"{input.dim()} dimensions" if input.dim() > strided.RANK else None
    if not backend.runs_triton("channel_sum", input, declined=declined):
        return channel_sum_reference(input, dim)
    output: Tensor = binding.apply(ChannelSum, input, dim)
    return output


def _samples(make: Maker) -> Iterator[Sample]:
    yield Sample("empty", input=make(0, 3), dim=1)
    yield Sample("no-channels", input=make(3, 0), dim=1)
    yield Sample("vector", input=make(7), dim=0)
    yield Sample("rows", input=make(65, 67), dim=-1, layouts=True)
    yield Sample("tiny", input=make(3, 2, 2), dim=1, gradcheck=True)
    yield Sample("splits", input=make(1031, 3), dim=1)
    yield Sample("images", input=make(3, 5, 33, 33), dim=1, layouts=True)
    yield Sample("first", input=make(9, 2, 3, 4, 5), dim=0)


def _workloads(make: Maker) -> Iterator[Sample]:
    yield Sample("linear-bias", input=make.empty(4096, 1024), dim=1)
    yield Sample("resnet50-s1", input=make.empty(32, 256, 56, 56), dim=1)
    images = make.empty(32, 256, 56, 56).to(memory_format=torch.channels_last)
    yield Sample("resnet50-s1-channels-last", input=images, dim=1)


def _rejects(make: Maker) -> Iterator[Reject]:
    yield Reject(
        "dim",
        r"channel_sum: dim 2 is not a dimension.*\(3, 4\)",
        input=make(3, 4),
        dim=2,
        raises=IndexError,
    )


def _cost(input: Tensor, dim: int = 1) -> dict[str, Cost]:
    size = input.numel() * input.element_size()
    return {"forward": Cost(input.numel(), size), "backward": Cost(0, 0)}


register(
    OpSpec(
        name="channel_sum",
        op=channel_sum,
        reference=channel_sum_reference,
        kernels=("reduce.channel_sum_kernel", "reduce.split_sum_kernel"),
        gradients=("input",),
        samples=_samples,
        workloads=_workloads,
        rejects=_rejects,
        cost=_cost,
        accuracy="multilinear",
        source="torch.sum",
        notes="gradient of the bias of linear and conv2d",
    )
)
