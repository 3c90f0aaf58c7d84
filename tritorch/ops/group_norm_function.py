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
norm_kernels = launch.kernels("norm")
reduce_kernels = launch.kernels("reduce")


class _Walk(NamedTuple):
    """How programs share out the images, in the order of the kernels' arguments."""

    config: Any
    # of each image and block of channels
    slices: int
    programs: int
    # tiles of a program
    steps: int
    pixels: int
    # the loop nest over the pixels, without the outermost
    sizes: tuple[int, int]
    # of each tensor along images, channels and the nest
    strides: tuple[int, ...]
    constants: dict[str, Any]


def _walk(*tensors: Tensor, reduces: bool) -> _Walk:
    """The walk along the memory of the last tensor."""
    return _plan_walk(reduces, *map(Layout.of, tensors))


@launch.planned
def _plan_walk(reduces: bool, *tensors: Layout) -> _Walk:
    (images, channels, *size), itemsize = tensors[-1].shape, tensors[-1].itemsize
    nest = strided.nest_of("group_norm", tuple(size), *(t.strides[2:] for t in tensors))
    vector = _vector(tensors, nest)
    along_channels = channels > 1 and tensors[-1].stride(1) == 1
    config = launch.config(kernels.group_norm_config, along_channels, nest.numel, itemsize)
    blocks = images * math.ceil(channels / config.kwargs["BLOCK_C"])
    tiles = math.ceil(nest.numel / config.kwargs["BLOCK_R"])
    if reduces:
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
    return _Walk(
        config,
        slices,
        blocks * slices,
        steps,
        nest.numel,
        (nest.sizes[1], nest.sizes[2]),
        strides,
        {"INDEX_64": wide, "VECTOR_R": vector[0], "VECTOR_C": vector[1]},
    )


def _vector(tensors: tuple[Layout, ...], nest: strided.Nest) -> tuple[int, int]:
    """Pixels and channels, 16 bytes at most, that lie together and aligned in every tensor."""
    most = 16 // tensors[0].itemsize
    outer = [tensor.stride(0) for tensor in tensors]
    if all(tensor.stride(1) == 1 for tensor in tensors):
        outer += [stride for along in nest.strides for stride in along]
        return 1, math.gcd(most, tensors[0].shape[1], *outer)
    # the innermost dimension of the nest; behind it is padding
    inner = max((dim for dim, size in enumerate(nest.sizes) if size > 1), default=0)
    if any(along[inner] != 1 for along in nest.strides):
        return 1, 1
    outer += [tensor.stride(1) for tensor in tensors]
    outer += [s for along in nest.strides for dim, s in enumerate(along) if dim != inner]
    return math.gcd(most, nest.sizes[inner], *outer), 1


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    # one value per channel: to copy the odd strided one is cheaper than to give each a stride
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
    channels = input.shape[1]
    walk = _walk(input, reduces=True)
    # mean and sum of squared deviations of each slice
    statistics = mean.new_empty((input.shape[0], walk.slices, 2, channels))
    launch.run(
        kernels.group_norm_stats_kernel,
        (walk.programs,),
        input,
        statistics,
        channels,
        walk.pixels,
        walk.steps,
        walk.slices,
        *walk.sizes,
        *walk.strides,
        on=input,
        config=walk.config,
        **walk.constants,
    )
    launch.run(
        kernels.group_norm_gather_stats_kernel,
        (math.ceil(mean.numel() / kernels.BLOCK_G),),
        statistics,
        mean,
        rstd,
        mean.numel(),
        channels,
        num_groups,
        walk.pixels,
        walk.steps,
        walk.slices,
        eps,
        on=input,
        INDEX_64=walk.constants["INDEX_64"],
        BLOCK_R=walk.config.kwargs["BLOCK_R"],
        BLOCK_G=kernels.BLOCK_G,
        BLOCK_K=kernels.BLOCK_K,
    )
    walk = _walk(input, output, reduces=False)
    launch.run(
        kernels.group_norm_forward_kernel,
        (walk.programs,),
        input,
        _contiguous(weight),
        _contiguous(bias),
        mean,
        rstd,
        output,
        channels,
        num_groups,
        walk.pixels,
        walk.steps,
        walk.slices,
        *walk.sizes,
        *walk.strides,
        on=input,
        config=walk.config,
        **walk.constants,
    )
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
    walk = _walk(grad_output, input, reduces=True)
    sums = mean.new_empty((images * walk.slices, 2, channels))
    launch.run(
        kernels.group_norm_backward_reduce_kernel,
        (walk.programs,),
        grad_output,
        input,
        mean,
        rstd,
        sums,
        channels,
        num_groups,
        walk.pixels,
        walk.steps,
        walk.slices,
        *walk.sizes,
        *walk.strides,
        on=input,
        config=walk.config,
        **walk.constants,
    )
    if of_parameters:
        total: Tensor = binding.apply(ChannelSum, sums.view(sums.shape[0], -1), 1)
        grads = total.view(2, channels)
    if not of_input:
        return grad_input, grads
    means = mean.new_empty((images, num_groups, 2))
    launch.run(
        kernels.group_norm_gather_sums_kernel,
        (math.ceil(mean.numel() / kernels.BLOCK_G),),
        sums,
        weight,
        means,
        mean.numel(),
        channels,
        num_groups,
        walk.pixels,
        walk.slices,
        on=input,
        INDEX_64=walk.constants["INDEX_64"],
        BLOCK_G=kernels.BLOCK_G,
        BLOCK_K=kernels.BLOCK_K,
    )
    walk = _walk(grad_output, input, grad_input, reduces=False)
    launch.run(
        kernels.group_norm_grad_input_kernel,
        (walk.programs,),
        grad_output,
        input,
        weight,
        mean,
        rstd,
        means,
        grad_input,
        channels,
        num_groups,
        walk.pixels,
        walk.steps,
        walk.slices,
        *walk.sizes,
        *walk.strides,
        on=input,
        config=walk.config,
        **walk.constants,
    )
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
