"""Group normalisation: launches, and its gradients in plain PyTorch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritorch import binding, launch
from tritorch.ops import strided
from tritorch.ops.reduce import ChannelSum, accumulator_dtype
from tritorch.ops.strided import Layout

kernels = launch.kernels("group_norm")
norm_kernels = launch.kernels("batch_norm")
reduce_kernels = launch.kernels("reduce")


class _Walk(NamedTuple):
    """How programs divide the images, along the memory of the last tensor."""

    # of each image and block of channels, and tiles of a slice
    slices: int
    steps: int
    pixels: int
    run: launch.Prepared


class _Reduction(NamedTuple):
    """Sums of slices, and what makes the groups' of them."""

    slices: int
    run: launch.Prepared
    gather: launch.Prepared


def _walk(kernel: Any, num_groups: int, *tensors: Layout) -> _Walk:
    (images, channels, *size), itemsize = tensors[-1].shape, tensors[-1].itemsize
    nest = strided.nest_of("group_norm", tuple(size), *(t.strides[2:] for t in tensors))
    vector = _vector(tensors, nest)
    along_channels = channels > 1 and tensors[-1].stride(1) == 1
    config = launch.config(kernels.group_norm_config, along_channels, nest.numel, itemsize)
    blocks = images * math.ceil(channels / config.kwargs["BLOCK_C"])
    tiles = math.ceil(nest.numel / config.kwargs["BLOCK_R"])
    if kernel in (kernels.group_norm_stats_kernel, kernels.group_norm_backward_reduce_kernel):
        steps = math.ceil(tiles / reduce_kernels.num_splits(blocks, tiles, kernels.MIN_STEPS))
    else:
        steps = min(tiles, norm_kernels.num_steps(blocks * tiles))
    slices = math.ceil(tiles / steps)
    strides: tuple[int, ...] = ()
    for tensor, along in zip(tensors, nest.strides, strict=True):
        strides += (*tensor.strides[:2], *along[:3])
    # two sums to a channel, and pixels of the last tiles that pass the end
    wide = math.prod(tensors[-1].shape) >= 2**30
    wide = wide or any(strided.is_wide(tensor.shape, tensor.strides) for tensor in tensors)
    groups = () if kernel is kernels.group_norm_stats_kernel else (num_groups,)
    sizes = (channels, *groups, nest.numel, steps, slices, *nest.sizes[1:3])
    run = launch.Prepared(
        kernel,
        (blocks * slices,),
        (*sizes, *strides),
        config,
        INDEX_64=wide,
        VECTOR_R=vector[0],
        VECTOR_C=vector[1],
    )
    return _Walk(slices, steps, nest.numel, run)


@launch.planned_by_kernel
def _plan(kernel: Any, num_groups: int, *tensors: Layout) -> launch.Prepared:
    return _walk(kernel, num_groups, *tensors).run


@launch.planned_by_kernel
def _plan_reduction(kernel: Any, num_groups: int, *tensors: Layout) -> _Reduction:
    walk = _walk(kernel, num_groups, *tensors)
    images, channels = tensors[-1].shape[:2]
    groups = images * num_groups
    sizes = [groups, channels, num_groups, walk.pixels]
    constants = {"INDEX_64": walk.run.constants["INDEX_64"], "BLOCK_G": kernels.BLOCK_G}
    if kernel is kernels.group_norm_stats_kernel:
        gather = kernels.group_norm_gather_stats_kernel
        sizes.append(walk.steps)
        constants["BLOCK_R"] = walk.run.config.kwargs["BLOCK_R"]
    else:
        gather = kernels.group_norm_gather_sums_kernel
    prepared = launch.Prepared(
        gather,
        (math.ceil(groups / kernels.BLOCK_G),),
        (*sizes, walk.slices),
        BLOCK_K=kernels.BLOCK_K,
        **constants,
    )
    return _Reduction(walk.slices, walk.run, prepared)


def _vector(tensors: tuple[Layout, ...], nest: strided.Nest) -> tuple[int, int]:
    """Pixels and channels, 16 bytes at most, that lie together and aligned in every tensor."""
    most = 16 // tensors[0].itemsize
    outer = [tensor.stride(0) for tensor in tensors]
    if all(tensor.stride(1) == 1 for tensor in tensors):
        outer += [stride for along in nest.strides for stride in along]
        return 1, math.gcd(most, tensors[0].shape[1], *outer)
    # the innermost dimension of the nest; those after it are padding of size 1
    inner = max((dim for dim, size in enumerate(nest.sizes) if size > 1), default=0)
    if any(along[inner] != 1 for along in nest.strides):
        return 1, 1
    outer += [tensor.stride(1) for tensor in tensors]
    outer += [s for along in nest.strides for dim, s in enumerate(along) if dim != inner]
    return math.gcd(most, nest.sizes[inner], *outer), 1


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    # one value per channel: copying a rare strided one is cheaper than a stride for each
    return None if parameter is None else parameter.contiguous()


def _outputs(
    input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulator_dtype(input.dtype)
    groups = (input.shape[0], num_groups)
    return (
        strided.empty_like(input),
        input.new_empty(groups, dtype=dtype),
        input.new_empty(groups, dtype=dtype),
    )


@binding.library_op(
    "group_norm_forward(Tensor input, int num_groups, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_outputs,
)
def group_norm_forward(
    input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and mean and 1 / sqrt(var + eps) of each group."""
    output, mean, rstd = _outputs(input, num_groups, weight, bias, eps)
    slices, run, gather = _plan_reduction(
        kernels.group_norm_stats_kernel, num_groups, Layout.of(input)
    )
    # mean and sum of squared deviations of each slice
    statistics = mean.new_empty((input.shape[0], slices, 2, input.shape[1]))
    run(input, input, statistics)
    gather(input, statistics, mean, rstd, floats=(eps,))
    parameters = _contiguous(weight), _contiguous(bias)
    run = _plan(kernels.group_norm_forward_kernel, num_groups, Layout.of(input), Layout.of(output))
    run(input, input, *parameters, mean, rstd, output)
    return output, mean, rstd


def _grads(
    grad_output: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    of_input: bool,
    of_parameters: bool,
) -> tuple[Tensor, Tensor]:
    return (
        strided.empty_like(input) if of_input else input.new_empty((0,)),
        mean.new_empty((2, input.shape[1]) if of_parameters else (0,)),
    )


@binding.library_op(
    "group_norm_backward(Tensor grad_output, Tensor input, int num_groups, Tensor? weight,"
    " Tensor mean, Tensor rstd, bool of_input, bool of_parameters) -> (Tensor, Tensor)",
    fake=_grads,
)
def group_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    of_input: bool,
    of_parameters: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of the input, and those of bias and weight, one after the other, in float32."""
    grad_input, grads = _grads(
        grad_output, input, num_groups, weight, mean, rstd, of_input, of_parameters
    )
    images, channels = input.shape[:2]
    weight = _contiguous(weight)
    read = Layout.of(grad_output), Layout.of(input)
    slices, run, gather = _plan_reduction(
        kernels.group_norm_backward_reduce_kernel, num_groups, *read
    )
    sums = mean.new_empty((images * slices, 2, channels))
    run(input, grad_output, input, mean, rstd, sums)
    if of_parameters:
        total: Tensor = binding.apply(ChannelSum, sums.view(sums.shape[0], -1), 1)
        grads = total.view(2, channels)
    if not of_input:
        return grad_input, grads
    means = mean.new_empty((images, num_groups, 2))
    gather(input, sums, weight, means)
    run = _plan(kernels.group_norm_grad_input_kernel, num_groups, *read, Layout.of(grad_input))
    run(input, grad_output, input, weight, mean, rstd, means, grad_input)
    return grad_input, grads


def plain_gradients(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, extent: int, eps: float
) -> tuple[Tensor | None, ...]:
    """What `group_norm_backward` computes, in plain PyTorch."""
    dtype = accumulator_dtype(input.dtype)
    others = [dim for dim in range(input.dim()) if dim != 1]

    def grouped(values: Tensor) -> Tensor:
        return values.reshape(values.shape[0], extent, -1)

    grad, x = grad_output.to(dtype), grouped(input.to(dtype))
    weighted = grad
    if weight is not None:
        weighted = grad * weight.to(dtype).view(-1, *(1,) * (input.dim() - 2))
    weighted = grouped(weighted)
    var, mean = torch.var_mean(x, 2, correction=0, keepdim=True)
    rstd = (var + eps).rsqrt()
    normalised = (x - mean) * rstd
    slope = (weighted * normalised).mean(2, True)
    grad_input = (weighted - weighted.mean(2, True) - normalised * slope) * rstd
    product = grad * normalised.view(input.shape)
    return (
        grad_input.view(input.shape).to(input.dtype),
        None if weight is None else product.sum(others).to(weight.dtype),
        grad.sum(others),
    )
