"""The stages of batch normalisation as library ops, named like torch's own.

They are separate, so that a normalisation over several devices can reduce between them:

    moments = batch_norm_moments(input)              # (3, C) on each device: one all-gather
    mean, var = batch_norm_gather_stats(moments of all, running_mean, running_var, momentum)
    output = batch_norm_elemt(input, residual, mean, var, weight, bias, eps, activation)

    sums, grad = batch_norm_backward_reduce(...)     # (2, C) on each device: one all-reduce
    grad_input = batch_norm_backward_elemt(..., sums of all, count of all, ...)

The gradients of bias and weight are the two rows of a device's own sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritorch import binding, launch
from tritorch.ops import strided
from tritorch.ops.norm_walk import FORWARD, GRAD_INPUT, REDUCE, STATS, walk_of
from tritorch.ops.reduce import ChannelSum, accumulator_dtype

kernels = launch.kernels("norm_stats")

# channels whose bits are stored together: as many as the widest tile has
_PANEL = 64


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    # one value per channel: copying a rare strided one is cheaper than a stride for each
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
    """Mean and biased variance of each channel; moves the running statistics once."""
    mean, var = _stats_outputs(input, running_mean, running_var, momentum)
    _merge(_statistics(input), running_mean, running_var, mean, var, None, momentum)
    return mean, var


def _statistics(input: Tensor) -> Tensor:
    """Mean, sum of squared deviations and count of each channel of each slice, (slices, 3, C)."""
    walk = walk_of(STATS, input)
    dtype = accumulator_dtype(input.dtype)
    statistics = input.new_empty((walk.slices, 3, input.shape[1]), dtype=dtype)
    walk.run(input, input, statistics)
    return statistics


def _merge(
    statistics: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    moments: Tensor | None,
    momentum: float,
) -> None:
    """Writes mean and var, or moments, of all slices; moves the running statistics once."""
    if statistics.shape[0] > kernels.MAX_SLICES:
        statistics = _merged_groups(statistics)
    slices, _, channels = statistics.shape
    strides = [0 if one is None else one.stride(0) for one in (running_mean, running_var)]
    run = _plan_merge(slices, channels, *strides)
    tensors = statistics, running_mean, running_var, mean, var, moments
    run(statistics, *tensors, floats=(momentum,))
    for running in (running_mean, running_var):
        # the dispatcher does not see what a kernel writes; inference tensors have no version
        if running is not None and not running.is_inference():
            launch.count_write(running)


def _merged_groups(statistics: Tensor) -> Tensor:
    slices, *rest = statistics.shape
    step = kernels.slices_of_group(slices)
    groups = math.ceil(slices / step)
    moments = statistics.new_empty((groups, *rest))
    run = _plan_merge(slices, rest[-1], 0, 0, step, groups)
    run(statistics, statistics, None, None, None, None, moments, floats=(0.0,))
    return moments


@launch.planned
def _plan_merge(
    slices: int,
    channels: int,
    mean_stride: int,
    var_stride: int,
    step: int | None = None,
    groups: int = 1,
) -> launch.Prepared:
    blocks = math.ceil(channels / kernels.BLOCK_C)
    return launch.Prepared(
        kernels.batch_norm_gather_stats_kernel,
        (blocks,) if step is None else (blocks, groups),
        (slices, channels, mean_stride, var_stride, step),
        BLOCK_S=kernels.BLOCK_S,
        BLOCK_C=kernels.BLOCK_C,
        num_warps=kernels.MERGE_WARPS,
    )


def _moments_output(input: Tensor) -> Tensor:
    return input.new_empty((3, input.shape[1]), dtype=accumulator_dtype(input.dtype))


@binding.library_op("batch_norm_moments(Tensor input) -> Tensor", fake=_moments_output)
def batch_norm_moments(input: Tensor) -> Tensor:
    """Mean, sum of squared deviations and count of each channel: (3, C) float32, or float64.

    `input` is (N, C, ...) of any strides; of an empty input all three are 0, and have no weight.
    """
    moments = _moments_output(input)
    if input.numel() == 0:
        return moments.zero_()
    _merge(_statistics(input), None, None, None, None, moments, 0.0)
    return moments


def _gather_outputs(
    moments: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    channels = moments.shape[2:]
    return moments.new_empty(channels), moments.new_empty(channels)


@binding.library_op(
    "batch_norm_gather_stats(Tensor moments, Tensor(a!)? running_mean, Tensor(b!)? running_var,"
    " float momentum) -> (Tensor, Tensor)",
    fake=_gather_outputs,
)
def batch_norm_gather_stats(
    moments: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) over all parts of a batch; moves the running statistics once.

    `moments` is (parts, 3, C), the results of `batch_norm_moments` for the parts; their order
    decides how the sums round.  The running variance moves towards the unbiased variance of the
    whole batch.
    """
    mean, var = _gather_outputs(moments, running_mean, running_var, momentum)
    _merge(moments.contiguous(), running_mean, running_var, mean, var, None, momentum)
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
    """activation((input - mean) / sqrt(var + eps) * weight + bias + residual), rounded once.

    `mean`, `var`, `weight` and `bias` are (C,); the output has the input's order of dimensions.
    """
    output = strided.empty_like(input)
    walk = walk_of(FORWARD, input, residual, output, activation=activation)
    channels = map(_contiguous, (mean, var, weight, bias))
    walk.run(input, input, residual, *channels, output, None, floats=(eps,))
    return output


def keeps_bits(input: Tensor, residual: Tensor, activation: str | None) -> bool:
    """Whether autograd keeps a bit of each element of the output, and not the output.

    The derivative of relu after a residual needs no more.  Bits are packed where one or two threads
    have a whole byte of them: for dtypes of up to 32 bits, with contiguous channels.
    """
    return (
        activation == "relu"
        and input.dtype.itemsize <= 4
        and input.shape[1] % _PANEL == 0
        and input.stride(1) == 1
        and input.stride() == residual.stride()
    )


def _bits_outputs(input: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    panels, rows = input.shape[1] // _PANEL, input.numel() // input.shape[1]
    bits = input.new_empty((panels, rows, _PANEL // 8), dtype=torch.uint8)
    return strided.empty_like(input), bits


@binding.library_op(
    "batch_norm_elemt_bits(Tensor input, Tensor residual, Tensor mean, Tensor var, Tensor? weight,"
    " Tensor? bias, float eps, str? activation) -> (Tensor, Tensor)",
    fake=_bits_outputs,
)
def batch_norm_elemt_bits(
    input: Tensor,
    residual: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """The output of `batch_norm_elemt`, and a bit of each element: whether its gradient passes.

    `activation` is "relu".  The bits are uint8 (C / 64, rows, 8): a byte has 8 channels, from the
    lowest bit on, and the rows are batch and pixels in their order, whatever the strides.
    """
    output, bits = _bits_outputs(input)
    walk = walk_of(FORWARD, input, residual, output, activation=activation, in_order=True)
    channels = map(_contiguous, (mean, var, weight, bias))
    walk.run(input, input, residual, *channels, output, bits, floats=(eps,))
    return output, bits


def unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The bits of `batch_norm_elemt_bits` as booleans of its input's shape, in plain PyTorch."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    rows = ((bits[..., None] >> places) & 1).bool().transpose(0, 1)
    return rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def _reduce_outputs(
    grad_output: Tensor, saved: Tensor | None, input: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    sums = input.new_empty((2, input.shape[1]), dtype=accumulator_dtype(input.dtype))
    return sums, input.new_empty((0,)) if saved is None else strided.empty_like(input)


@binding.library_op(
    "batch_norm_backward_reduce(Tensor grad_output, Tensor? saved, Tensor input, Tensor mean,"
    " Tensor var, Tensor? weight, Tensor? bias, float eps, str? activation) -> (Tensor, Tensor)",
    fake=_reduce_outputs,
)
def batch_norm_backward_reduce(
    grad_output: Tensor,
    saved: Tensor | None,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """Sums (2, C) of g and of g * normalised input; g is the gradient before the activation.

    Without a residual `saved` is None, and the activation's operand is computed again.  With one,
    `saved` is the output where `needs_output(activation)`, or the bits of `batch_norm_elemt_bits`,
    else the residual, and g is returned too.
    """
    sums, masked = _reduce_outputs(grad_output, saved, input)
    written = None if saved is None else masked
    in_bits = saved is not None and saved.dtype == torch.uint8
    tensors = grad_output, None if in_bits else saved, written, input
    walk = walk_of(REDUCE, *tensors, activation=activation, in_order=in_bits)
    partial = sums
    if walk.slices > 1:
        partial = sums.new_empty((walk.slices, *sums.shape))
    channels = map(_contiguous, (mean, var, weight, bias))
    walk.run(input, grad_output, saved, input, *channels, written, partial, floats=(eps,))
    if partial is not sums:
        total: Tensor = binding.apply(ChannelSum, partial.view(walk.slices, -1), 1)
        sums = total.view(2, -1)
    return sums, masked


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
    """Gradient of the input, of the given strides.

    `sums` are those of `batch_norm_backward_reduce` over `count` elements of each channel, or None
    where mean and variance do not depend on the input.  Where only the GPU knows the count, `sums`
    are divided by it and `count` is 1.  `activation` is None where `grad_output` is the gradient
    before the activation; otherwise the activation's operand is computed again.
    """
    grad_input = grad_output.new_empty_strided(grad_output.shape, stride)
    walk = walk_of(GRAD_INPUT, grad_output, input, grad_input, activation=activation, count=count)
    channels = map(_contiguous, (mean, var, weight, bias))
    walk.run(grad_output, grad_output, input, *channels, sums, grad_input, floats=(eps,))
    return grad_input
