"""The stages of batch normalisation as library ops, named like torch's own.

Statistics, pass over the input, sums of the gradient, pass over the gradient: each is a whole, so
that a normalisation over several devices can exchange statistics and sums in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritorch import binding, launch
from tritorch.ops import strided
from tritorch.ops.reduce import ChannelSum, accumulator_dtype
from tritorch.ops.strided import Layout

kernels = launch.kernels("norm")
reduce_kernels = launch.kernels("reduce")


class _Walk(NamedTuple):
    """How programs share out tensors of one shape, in the order of the kernels' arguments."""

    config: Any
    # programs per block of channels
    slices: int
    programs: int
    # channels, rows, tiles of a program, and the loop nest over the rows without the outermost
    sizes: tuple[int, ...]
    # of each tensor along the channels and along the nest; zeros for None
    strides: tuple[int, ...]
    constants: dict[str, int]


def _walk(*tensors: Tensor | None, reduces: bool) -> _Walk:
    """The walk along the memory of the last tensor."""
    layouts = (None if tensor is None else Layout.of(tensor) for tensor in tensors)
    return _plan_walk(reduces, *layouts)


@launch.planned
def _plan_walk(reduces: bool, *tensors: Layout | None) -> _Walk:
    given = [tensor for tensor in tensors if tensor is not None]
    last = given[-1]
    channels = last.shape[1]
    rows = math.prod(last.shape) // channels
    images = [(tensor.strides[0], *tensor.strides[2:]) for tensor in given]
    nest = strided.nest_of("batch_norm", (last.shape[0], *last.shape[2:]), *images)
    vector = _vector(given, nest)
    config = launch.config(
        kernels.batch_norm_config,
        channels > 1 and last.stride(1) == 1,
        channels,
        max(vector),
        last.itemsize,
    )
    blocks = math.ceil(channels / config.kwargs["BLOCK_C"])
    tiles = math.ceil(rows / config.kwargs["BLOCK_R"])
    if reduces:
        steps = math.ceil(tiles / reduce_kernels.num_splits(blocks, tiles, kernels.MIN_STEPS))
    else:
        steps = kernels.num_steps(blocks * tiles)
    slices = math.ceil(tiles / steps)
    along = iter(nest.strides)
    strides: tuple[int, ...] = ()
    for tensor in tensors:
        strides += (0,) * 6 if tensor is None else (tensor.stride(1), *next(along))
    # the rows of the last tiles pass the end
    overrun = (steps + 1) * config.kwargs["BLOCK_R"]
    wide = rows + overrun >= 2**31 or any(strided.is_wide(t.shape, t.strides) for t in given)
    constants = {"INDEX_64": wide, "VECTOR_R": vector[0], "VECTOR_C": vector[1]}
    return _Walk(
        config,
        slices,
        blocks * slices,
        (channels, rows, steps, *nest.sizes[1:]),
        strides,
        constants,
    )


def _vector(tensors: Sequence[Layout], nest: strided.Nest) -> tuple[int, int]:
    """Rows and channels, 16 bytes at most, that lie together and aligned in every tensor."""
    vector = 16 // tensors[0].itemsize
    along_channels = [tensor.stride(1) for tensor in tensors]
    if all(stride == 1 for stride in along_channels):
        strides = (stride for along in nest.strides for stride in along)
        return 1, math.gcd(vector, tensors[0].shape[1], *strides)
    # the innermost dimension of the nest; behind it is padding
    inner = max((dim for dim, size in enumerate(nest.sizes) if size > 1), default=0)
    if any(along[inner] != 1 for along in nest.strides):
        return 1, 1
    outer = (s for along in nest.strides for dim, s in enumerate(along) if dim != inner)
    return math.gcd(vector, nest.sizes[inner], *along_channels, *outer), 1


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    # one value per channel: to copy the odd strided one is cheaper than to give each a stride
    return None if tensor is None else tensor.contiguous()


def _stats_outputs(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    dtype = accumulator_dtype(input.dtype)
    channels = (input.shape[1],)
    return input.new_empty(channels, dtype=dtype), input.new_empty(channels, dtype=dtype)


@binding.library_op(
    "batch_norm_stats(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var,"
    " float momentum) -> (Tensor, Tensor)",
    fake=_stats_outputs,
)
def batch_norm_stats(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel; moves the running ones once."""
    mean, var = _stats_outputs(input, running_mean, running_var, momentum)
    walk = _walk(input, reduces=True)
    channels = input.shape[1]
    # mean, sum of squared deviations and count of each slice
    statistics = mean.new_empty((walk.slices, 3, channels))
    launch.run(
        kernels.batch_norm_stats_kernel,
        (walk.programs,),
        input,
        statistics,
        *walk.sizes,
        *walk.strides,
        on=input,
        config=walk.config,
        **walk.constants,
    )
    launch.run(
        kernels.batch_norm_gather_stats_kernel,
        (math.ceil(channels / kernels.BLOCK_C),),
        statistics,
        running_mean,
        running_var,
        mean,
        var,
        walk.slices,
        channels,
        running_mean.stride(0) if running_mean is not None else 0,
        running_var.stride(0) if running_var is not None else 0,
        momentum,
        on=input,
        BLOCK_S=kernels.BLOCK_S,
        BLOCK_C=kernels.BLOCK_C,
        num_warps=kernels.MERGE_WARPS,
    )
    for running in (running_mean, running_var):
        # the dispatcher does not count what a kernel writes, and inference tensors are not counted
        if running is not None and not running.is_inference():
            torch.autograd.graph.increment_version(running)
    return mean, var


@binding.library_op(
    "batch_norm_elemt(Tensor input, Tensor? residual, Tensor mean, Tensor var, Tensor? weight,"
    " Tensor? bias, float eps, str? activation) -> Tensor",
    fake=lambda input, *others: strided.empty_like(input),
)
def batch_norm_elemt(
    input: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
) -> Tensor:
    """activation((input - mean) / sqrt(var + eps) * weight + bias + residual)."""
    output = strided.empty_like(input)
    walk = _walk(input, residual, output, reduces=False)
    launch.run(
        kernels.batch_norm_forward_kernel,
        (walk.programs,),
        input,
        residual,
        *map(_contiguous, (mean, var, weight, bias)),
        output,
        *walk.sizes,
        *walk.strides,
        eps,
        on=input,
        config=walk.config,
        ACTIVATION=activation,
        **walk.constants,
    )
    return output


def _masked_output(input: Tensor, output: Tensor | None) -> Tensor:
    return strided.empty_like(input) if output is not None else input.new_empty((0,))


def _reduce_outputs(
    grad_output: Tensor, output: Tensor | None, input: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    sums = input.new_empty((2, input.shape[1]), dtype=accumulator_dtype(input.dtype))
    return sums, _masked_output(input, output)


@binding.library_op(
    "batch_norm_backward_reduce(Tensor grad_output, Tensor? output, Tensor input, Tensor mean,"
    " Tensor var, Tensor? weight, Tensor? bias, float eps, str? activation) -> (Tensor, Tensor)",
    fake=_reduce_outputs,
)
def batch_norm_backward_reduce(
    grad_output: Tensor,
    output: Tensor | None,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """Sums (2, C) of g and of g * normalised input; g is the gradient before the activation.

    `activation` finds g from the output computed again; a given `output` does too, and returns g.
    """
    masked = _masked_output(input, output)
    written = masked if output is not None else None
    walk = _walk(grad_output, output, written, input, reduces=True)
    partial = input.new_empty(
        (walk.slices, 2, input.shape[1]), dtype=accumulator_dtype(input.dtype)
    )
    launch.run(
        kernels.batch_norm_backward_reduce_kernel,
        (walk.programs,),
        grad_output,
        output,
        input,
        *map(_contiguous, (mean, var, weight, bias)),
        written,
        partial,
        *walk.sizes,
        *walk.strides,
        eps,
        on=input,
        config=walk.config,
        ACTIVATION=activation,
        **walk.constants,
    )
    if walk.slices == 1:
        return partial[0], masked
    sums: Tensor = binding.apply(ChannelSum, partial.view(walk.slices, -1), 1)
    return sums.view(2, -1), masked


@binding.library_op(
    "batch_norm_backward_elemt(Tensor grad_output, Tensor? input, Tensor mean, Tensor var,"
    " Tensor? weight, Tensor? bias, Tensor? sums, SymInt count, SymInt[] stride, float eps,"
    " str? activation) -> Tensor",
    fake=lambda grad_output, input, mean, var, weight, bias, sums, count, stride, *others: (
        grad_output.new_empty_strided(grad_output.shape, stride)
    ),
)
def batch_norm_backward_elemt(
    grad_output: Tensor,
    input: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor | None,
    count: int,
    stride: Sequence[int],
    eps: float,
    activation: str | None,
) -> Tensor:
    """Gradient of the input; `sums` over `count` elements where mean and variance depend on it."""
    grad_input = grad_output.new_empty_strided(grad_output.shape, stride)
    walk = _walk(grad_output, input, grad_input, reduces=False)
    launch.run(
        kernels.batch_norm_grad_input_kernel,
        (walk.programs,),
        grad_output,
        input,
        *map(_contiguous, (mean, var, weight, bias)),
        sums,
        grad_input,
        *walk.sizes,
        count,
        *walk.strides,
        eps,
        on=grad_output,
        config=walk.config,
        ACTIVATION=activation,
        **walk.constants,
    )
    return grad_input
