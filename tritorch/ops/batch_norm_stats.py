"""Statistics of batch normalisation as library ops: of one device, and of the parts of a batch."""

from __future__ import annotations

import math

from torch import Tensor

from tritorch import binding, launch
from tritorch.ops.batch_norm_stages import walk_of
from tritorch.ops.reduce import accumulator_dtype

kernels = launch.kernels("batch_norm_stats")


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
    _merge(_moments_of_slices(input), running_mean, running_var, mean, var, None, momentum)
    return mean, var


def _moments_of_slices(input: Tensor) -> Tensor:
    """Mean, sum of squared deviations and count of each channel of each slice, (slices, 3, C)."""
    walk = walk_of(kernels.batch_norm_stats_kernel, input)
    dtype = accumulator_dtype(input.dtype)
    moments = input.new_empty((walk.slices, 3, input.shape[1]), dtype=dtype)
    walk.run(input, input, moments)
    return moments


def _merge(
    moments: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    merged: Tensor | None,
    momentum: float,
) -> None:
    """Writes mean and var, or merged moments, of all slices; moves the running statistics once."""
    if moments.shape[0] > kernels.MAX_SLICES:
        moments = _merged_groups(moments)
    slices, _, channels = moments.shape
    strides = [0 if one is None else one.stride(0) for one in (running_mean, running_var)]
    run = _plan_merge(slices, channels, *strides)
    tensors = moments, running_mean, running_var, mean, var, merged
    run(moments, *tensors, floats=(momentum,))
    for running in (running_mean, running_var):
        # the dispatcher does not see what a kernel writes; inference tensors have no version
        if running is not None and not running.is_inference():
            launch.count_write(running)


def _merged_groups(moments: Tensor) -> Tensor:
    slices, *rest = moments.shape
    step = kernels.slices_of_group(slices)
    groups = math.ceil(slices / step)
    merged = moments.new_empty((groups, *rest))
    run = _plan_merge(slices, rest[-1], 0, 0, step, groups)
    run(moments, moments, None, None, None, None, merged, floats=(0.0,))
    return merged


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
    _merge(_moments_of_slices(input), None, None, None, None, moments, 0.0)
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
