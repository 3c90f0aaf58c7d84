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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritorch import binding, launch
from tritorch.ops import strided
from tritorch.ops.activation_function import computes, needs_output
from tritorch.ops.reduce import ChannelSum, accumulator_dtype
from tritorch.ops.strided import Layout

kernels = launch.kernels("batch_norm")
stats_kernels = launch.kernels("batch_norm_stats")
reduce_kernels = launch.kernels("reduce")

# channels whose bits are stored together: as many as the widest tile has
_PANEL = 64


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    # one value per channel: copying a rare strided one is cheaper than a stride for each
    return None if tensor is None else tensor.contiguous()


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
    walk = walk_of(
        kernels.batch_norm_forward_kernel, input, residual, output, activation=activation
    )
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
    walk = walk_of(
        kernels.batch_norm_forward_kernel,
        input,
        residual,
        output,
        activation=activation,
        in_order=True,
    )
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
    walk = walk_of(
        kernels.batch_norm_backward_reduce_kernel, *tensors, activation=activation, in_order=in_bits
    )
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
    walk = walk_of(
        kernels.batch_norm_grad_input_kernel,
        grad_output,
        input,
        grad_input,
        activation=activation,
        count=count,
    )
    channels = map(_contiguous, (mean, var, weight, bias))
    walk.run(grad_output, grad_output, input, *channels, sums, grad_input, floats=(eps,))
    return grad_input


class Walk(NamedTuple):
    """How programs divide tensors of one shape."""

    # programs per block of channels
    slices: int
    run: launch.Prepared


def walk_of(
    kernel: Any,
    *tensors: Tensor | None,
    activation: str | None = None,
    count: int | None = None,
    in_order: bool = False,
) -> Walk:
    """The walk of a kernel along the memory of the last tensor, or over its rows in their order."""
    layouts = [None if tensor is None else Layout.of(tensor) for tensor in tensors]
    return _plan_walk(kernel, activation, count, in_order, *layouts)


@launch.planned_by_kernel
def _plan_walk(
    kernel: Any,
    activation: str | None,
    count: int | None,
    in_order: bool,
    *tensors: Layout | None,
) -> Walk:
    is_stats = kernel is stats_kernels.batch_norm_stats_kernel
    is_reduce = kernel is kernels.batch_norm_backward_reduce_kernel
    given = [tensor for tensor in tensors if tensor is not None]
    last = given[-1]
    channels = last.shape[1]
    rows = math.prod(last.shape) // channels
    images = [(tensor.strides[0], *tensor.strides[2:]) for tensor in given]
    nest_of = strided.nest_in_order if in_order else strided.nest_of
    nest = nest_of("batch_norm", (last.shape[0], *last.shape[2:]), *images)
    vector = _vector(given, nest)
    config = launch.config(
        kernels.batch_norm_config,
        channels > 1 and last.stride(1) == 1,
        channels,
        max(vector),
        last.itemsize,
        computes(activation),
    )
    blocks = math.ceil(channels / config.kwargs["BLOCK_C"])
    tiles = math.ceil(rows / config.kwargs["BLOCK_R"])
    if is_stats or is_reduce:
        least = kernels.MIN_STEPS
        splits = reduce_kernels.num_splits(blocks, tiles, least, kernels.REDUCTIONS)
        steps = math.ceil(tiles / splits)
    else:
        steps = kernels.num_steps(blocks * tiles)
    slices = math.ceil(tiles / steps)
    along = iter(nest.strides)
    # strides of each tensor along the channels and along the nest; zeros for None
    strides: tuple[int, ...] = ()
    for tensor in tensors:
        strides += (0,) * 6 if tensor is None else (tensor.stride(1), *next(along))
    # the rows of the last tiles pass the end
    overrun = (steps + 1) * config.kwargs["BLOCK_R"]
    wide = rows + overrun >= 2**31 or any(strided.is_wide(t.shape, t.strides) for t in given)
    constants = {"INDEX_64": wide, "VECTOR_R": vector[0], "VECTOR_C": vector[1]}
    if not is_stats:
        constants["ACTIVATION"] = activation
    if is_reduce or kernel is kernels.batch_norm_grad_input_kernel:
        constants["FROM_OUTPUT"] = activation is not None and needs_output(activation)
    # channels, rows, tiles of a program, and the loop nest over the rows without the outermost
    sizes = (channels, rows, steps, *nest.sizes[1:])
    numbers = (*sizes, *strides) if count is None else (*sizes, count, *strides)
    prepared = launch.Prepared(
        kernel,
        (blocks * slices,),
        numbers,
        config,
        **constants,
    )
    return Walk(slices, prepared)


def _vector(tensors: Sequence[Layout], nest: strided.Nest) -> tuple[int, int]:
    """Rows and channels, 16 bytes at most, that lie together and aligned in every tensor."""
    vector = 16 // tensors[0].itemsize
    along_channels = [tensor.stride(1) for tensor in tensors]
    if all(stride == 1 for stride in along_channels):
        strides = (stride for along in nest.strides for stride in along)
        return 1, math.gcd(vector, tensors[0].shape[1], *strides)
    # the innermost dimension of the nest; those after it are padding of size 1
    inner = max((dim for dim, size in enumerate(nest.sizes) if size > 1), default=0)
    if any(along[inner] != 1 for along in nest.strides):
        return 1, 1
    outer = (s for along in nest.strides for dim, s in enumerate(along) if dim != inner)
    return math.gcd(vector, nest.sizes[inner], *along_channels, *outer), 1
