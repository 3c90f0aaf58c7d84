"""Group normalisation: reference, launches and gradient, public function, declaration."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import backend, binding, checks, launch
from tritorch.ops import second_gradient, strided
from tritorch.ops.reduce import ChannelSum, accumulator_dtype
from tritorch.ops.strided import Layout
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register

kernels = launch.kernels("group_norm")
norm_kernels = launch.kernels("norm")
reduce_kernels = launch.kernels("reduce")


def group_norm_reference(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(input - mean) / sqrt(var + eps) * weight + bias, over the channels of a group."""
    return F.group_norm(input, num_groups, weight, bias, eps)


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
def _group_norm_forward(
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
def _group_norm_backward(
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


class GroupNorm(torch.autograd.Function):
    """Keeps the input, the weight, and mean and rstd of each group, as torch does."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        output: Tensor
        output, mean, rstd = _group_norm_forward(input, num_groups, weight, bias, eps)
        ctx.save_for_backward(input, weight, mean, rstd)
        ctx.num_groups, ctx.eps = num_groups, eps
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        of_input, _, of_weight, of_bias, _ = ctx.needs_input_grad
        grad_input, grad_weight, grad_bias = binding.apply(
            GroupNormBackward,
            grad_output,
            *ctx.saved_tensors,
            ctx.num_groups,
            ctx.eps,
            ctx.bias_dtype,
            (of_input, of_weight, of_bias),
        )
        return grad_input, None, grad_weight, grad_bias, None


class GroupNormBackward(torch.autograd.Function):
    """Gradients of input, weight and bias; their own gradients are plain PyTorch's."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        num_groups: int,
        eps: float,
        bias_dtype: torch.dtype | None,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:
        of_input, of_weight, of_bias = wanted
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_output, input, weight)
        ctx.num_groups, ctx.eps = num_groups, eps
        grad_input, grads = _group_norm_backward(
            grad_output, input, num_groups, weight, mean, rstd, of_input, of_weight or of_bias
        )
        grad_weight = grad_bias = None
        if of_weight and weight is not None:
            grad_weight = grads[1].to(weight.dtype)
        if of_bias:
            grad_bias = grads[0].to(bias_dtype)
        return grad_input if of_input else None, grad_weight, grad_bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plain = functools.partial(_plain_gradients, num_groups=ctx.num_groups, eps=ctx.eps)
        wanted = ctx.needs_input_grad[:3]
        found = second_gradient.through(plain, ctx.saved_tensors, wanted, grads)
        return *found, *(None,) * 6


def _plain_gradients(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, num_groups: int, eps: float
) -> tuple[Tensor | None, ...]:
    """What `GroupNormBackward` computes, in plain PyTorch."""
    dtype = accumulator_dtype(input.dtype)
    others = [dim for dim in range(input.dim()) if dim != 1]

    def grouped(values: Tensor) -> Tensor:
        return values.reshape(values.shape[0], num_groups, -1)

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


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(input - mean) / sqrt(var + eps) * weight + bias, over the channels of a group.

    Args:
        input: (N, C) or (N, C, ...), up to five dimensions, any strides.
        num_groups: groups of C / num_groups neighbouring channels each, over which and over all
            pixels of an image mean and biased variance are taken.
        weight, bias: (C,) or None; of the input's dtype, or float32 for an input of 16 bits.

    Returns:
        A tensor of the input's shape and dtype, rounded once; under autocast float32.  It has the
        input's order of dimensions: channels_last stays, where torch on a GPU drops it.  Statistics
        are float32 (float64 for float64), summed in an order that shape and strides alone decide,
        and so are the gradients of weight and bias.

    Raises:
        RuntimeError: an input without channels; `num_groups` negative or no divisor of them; a
            weight or bias of another shape; dtypes or devices that do not match.
        ValueError: one value in all.
        ZeroDivisionError: no groups.

    Gradients of its gradients are computed by plain PyTorch.

    Source: `torch.nn.functional.group_norm`; https://arxiv.org/abs/1803.08494.
    """
    op = "group_norm"
    checks.tensor(op, input=input)
    _check(input, num_groups, weight, bias)
    declined = f"{input.dim()} dimensions" if input.dim() > strided.RANK else None
    # of an empty input nothing is to be normalised
    if input.numel() == 0 or not backend.runs_triton(op, input, weight, bias, declined=declined):
        return group_norm_reference(input, num_groups, weight, bias, eps)
    input, weight, bias = binding.autocast_to_float32(input, weight, bias)
    checks.parameters(op, input, accumulator_dtype(input.dtype), weight=weight, bias=bias)
    output: Tensor = binding.apply(GroupNorm, input, num_groups, weight, bias, eps)
    return output


def _check(input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None) -> None:
    op = "group_norm"
    if input.dim() < 2:
        checks.fail(
            RuntimeError, op, "input must have a batch and a channel dimension", input=input
        )
    if not isinstance(num_groups, (int, torch.SymInt)):
        checks.fail(TypeError, op, "num_groups must be an integer", num_groups=num_groups)
    if num_groups == 0:
        checks.fail(ZeroDivisionError, op, "num_groups must be positive", num_groups=num_groups)
    images, channels, *size = input.shape
    # torch's own count, which is that of a group only where there is one image
    if images * channels // num_groups * math.prod(size) == 1:
        checks.fail(ValueError, op, "expected more than one value per group", input=input)
    if num_groups < 0:
        checks.fail(RuntimeError, op, "num_groups must be positive", num_groups=num_groups)
    if channels % num_groups:
        checks.fail(
            RuntimeError,
            op,
            "the channels must be divisible by num_groups",
            input=input,
            num_groups=num_groups,
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != (channels,):
            checks.fail(
                RuntimeError,
                op,
                f"{name} must be a vector of {channels} elements",
                input=input,
                **{name: parameter},
            )


def _samples(make: Maker) -> Iterator[Sample]:
    def sample(name: str, *shape: int, groups: int, affine: str = "wb", **more: Any) -> Sample:
        scale, offset = more.pop("scale", 1.0), more.pop("offset", 0.0)
        param = make.float32 if more.pop("float32", False) and make.dtype.itemsize < 4 else make
        return Sample(
            name,
            input=make(*shape, scale=scale) + offset,
            num_groups=groups,
            weight=param(shape[1], low=0.5, high=1.5) if "w" in affine else None,
            bias=param(shape[1], low=-0.5, high=0.5) if "b" in affine else None,
            eps=more.pop("eps", 1e-5),
            **more,
        )

    yield sample("images", 3, 6, 4, 7, groups=2, layouts=True)
    # two slices of pixels that end inside a tile, and two tiles of channels
    yield sample("pixel-slices", 1, 5, 61, 71, groups=5, float32=True, eps=1e-3)
    # more sums to a group than are merged at once
    yield sample("one-group", 2, 131, 3, groups=1)
    yield sample("rows", 5, 6, groups=2, affine="w")
    yield sample("volume", 2, 4, 2, 3, 2, groups=4, affine="")
    if make.dtype != torch.float64:
        # where the mean costs 5 digits, the truth in float64 is good for no float64
        yield sample("far-from-zero", 2, 4, 90, groups=2, affine="", scale=0.01, offset=1000.0)
    yield sample("empty", 0, 4, 3, groups=2)
    yield sample("tiny", 1, 4, 2, groups=2, gradcheck=True)


def _workloads(make: Maker) -> Iterator[Sample]:
    def sample(name: str, input: Tensor) -> Sample:
        parameter = make.empty(input.shape[1])
        return Sample(name, input=input, num_groups=32, weight=parameter, bias=parameter, eps=1e-5)

    images = make.empty(32, 256, 56, 56)
    yield sample("resnet50-s1", images)
    yield sample("resnet50-s1-channels-last", images.to(memory_format=torch.channels_last))
    small = make.empty(32, 2048, 4, 4)
    yield sample("few-pixels", small)
    yield sample("few-pixels-channels-last", small.to(memory_format=torch.channels_last))


def _rejects(make: Maker) -> Iterator[Reject]:
    def reject(name: str, message: str, *shape: int, **more: Any) -> Reject:
        given: dict[str, Any] = {"num_groups": 2, "input": make(*shape)}
        return Reject(name, message, **(given | more))

    yield reject("vector", r"a batch and a channel dimension.*\(6,\)", 6)
    yield reject("no-groups", r"num_groups must be positive \(num_groups 0\)", 2, 6, num_groups=0)
    yield reject("negative", r"num_groups must be positive", 2, 6, num_groups=-1)
    yield reject("fraction", r"num_groups must be an integer", 2, 6, num_groups=2.0)
    yield reject("divisor", r"divisible by num_groups .*num_groups 4", 2, 6, num_groups=4)
    yield reject("one-value", r"more than one value", 1, 2)
    yield reject("weight", r"weight must be a vector of 6.*\(3,\)", 2, 6, weight=make(3))
    yield reject("bias", r"bias must be a vector of 6.*\(1, 6\)", 2, 6, bias=make(1, 6))
    yield reject("dtypes", r"parameters.*must share.*dtype|dtype", 2, 6, weight=make(6).double())


def _cost(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> dict[str, Cost]:
    """The sums and the results each read the input; all gradients wanted."""
    size = input.numel() * input.element_size()
    return {
        "forward": Cost(8 * input.numel(), 3 * size),
        "backward": Cost(10 * input.numel(), 5 * size),
    }


register(
    OpSpec(
        name="group_norm",
        op=group_norm,
        reference=group_norm_reference,
        kernels=(
            "group_norm.group_norm_stats_kernel",
            "group_norm.group_norm_gather_stats_kernel",
            "group_norm.group_norm_forward_kernel",
            "group_norm.group_norm_backward_reduce_kernel",
            "group_norm.group_norm_gather_sums_kernel",
            "group_norm.group_norm_grad_input_kernel",
            "reduce.channel_sum_kernel",
        ),
        gradients=("input", "weight", "bias"),
        samples=_samples,
        workloads=_workloads,
        rejects=_rejects,
        cost=_cost,
        accuracy="composite",
        source="torch.nn.functional.group_norm, https://arxiv.org/abs/1803.08494",
        autocast="float32",
        layers=("GroupNorm",),
    )
)
